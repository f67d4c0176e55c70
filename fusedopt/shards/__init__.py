"""Gradients of which parts are in other processes: where, and adding up over them what a step has to know."""

from .agreement import agree_on_parameters
from .domains import Domains, Shards, refuse_what_cannot_be_added_up
from .flat import is_flat_shard, refuse_norm_of_flat_shards
from .gradients import settle_gradient
from .left_behind import refuse_what_was_left_behind
from .numbers import numbers_of
from .reduction import add_up, combined
from .scalers import refuse_scaling_by_shares, refuse_scaling_of_flat_shards, tell_calling_scaler
from .shares import share_being_made
from .state_dicts import flat_state_being_loaded, state_is_being_made

__all__ = [
    "Domains",
    "Shards",
    "add_up",
    "agree_on_parameters",
    "combined",
    "flat_state_being_loaded",
    "is_flat_shard",
    "numbers_of",
    "refuse_norm_of_flat_shards",
    "refuse_scaling_by_shares",
    "refuse_scaling_of_flat_shards",
    "refuse_what_cannot_be_added_up",
    "refuse_what_was_left_behind",
    "settle_gradient",
    "share_being_made",
    "state_is_being_made",
    "tell_calling_scaler",
]
