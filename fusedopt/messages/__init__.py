"""Messages that all layers share: checks of arguments, names in errors, warnings, and extras to install."""

from .caller import warn_caller
from .dtensors import deal_out_as, dealt_out, dealt_out_alike, is_dtensor, local_of, whole
from .extras import MissingExtraError, require
from .names import did_you_mean, group_names, parameter_name
from .numbers import as_float, check_betas, check_flag, check_number, check_whole_number, is_number
from .plain import plain, plain_groups, plain_settings
from .tables import aligned
from .tensors import (
    SUPPORTED_DTYPES,
    check_gradient,
    check_no_model,
    check_parameter,
    check_state_kinds,
    parse_dtype,
)
from .text import encodable, one_line, some

__all__ = [
    "SUPPORTED_DTYPES",
    "MissingExtraError",
    "aligned",
    "as_float",
    "check_betas",
    "check_flag",
    "check_gradient",
    "check_no_model",
    "check_number",
    "check_parameter",
    "check_state_kinds",
    "check_whole_number",
    "deal_out_as",
    "dealt_out",
    "dealt_out_alike",
    "did_you_mean",
    "encodable",
    "group_names",
    "is_dtensor",
    "is_number",
    "local_of",
    "one_line",
    "parameter_name",
    "parse_dtype",
    "plain",
    "plain_groups",
    "plain_settings",
    "require",
    "some",
    "warn_caller",
    "whole",
]
