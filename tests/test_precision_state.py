"""State in fewer bits: saved and loaded in its own form and in torch's, converted, resumed; and the bytes it takes."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import bits, module, set_gradients
from torch import Tensor, nn

import fusedopt
from fusedopt.cli.recipes import memory_of_each
from fusedopt.optimizers.conversion import CODES_ORDER, CODES_SHAPE
from fusedopt.rules.codes import CODE_BLOCK, FORMS, decode, encode, encode_again
from fusedopt.rules.masters import low_of, master_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BACKENDS = ["reference", *(["native"] if module is not None else [])]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(70,), (3, 5), (), (2, 3, 8, 9)]

#: Every way to keep moments, and masters.
STATES: list[Any] = [None, "float32", "bfloat16", "float16", "int8", {"exp_avg": "int8", "exp_avg_sq": "bfloat16"}]
MASTERS = [None, "float32", "split", "split8"]


#: Prints the bytes for each of many parameters that the process has got, and those that are counted.
PROCESS = """
import torch, fusedopt
def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
def trained(numel):
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
    optimizer = fusedopt.FusedAdamW([param], lr=0.1, state_dtype="int8", master="split8", backend="native")
    param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer
small, before = trained(4096), resident()
large = trained(32 << 20)
print((resident() - before) / (32 << 20), large.bytes_per_parameter().held)
"""


def made(dtype: torch.dtype = FP32, seed: int = 0, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def adamw(params: list[nn.Parameter], **kept: Any) -> Any:
    return fusedopt.FusedAdamW(params, lr=0.05, **kept)


def step(params: list[nn.Parameter], optimizer: Any, *seeds: int) -> None:
    for seed in seeds:
        set_gradients(params, seed)
        optimizer.step()


def twin(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def contents(optimizer: Any) -> list[dict[str, Any]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        {key: bits([value]) if isinstance(value, Tensor) else value for key, value in optimizer.state[param].items()}
        for param in params
    ]


def adamw_saved(params: list[nn.Parameter]) -> Any:
    """The state dict of an optimizer in float32 that has stepped once."""
    step(others := twin(params), optimizer := adamw(others), 0)
    return optimizer.state_dict()


def values(optimizer: Any) -> list[Tensor]:
    """The moments, however they are kept."""
    saved = optimizer.state_dict(as_torch=True)["state"]
    return [entry[key] for entry in saved.values() for key in ("exp_avg", "exp_avg_sq")]


@contextmanager
def remarks() -> Iterator[list[str]]:
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(each.message) for each in caught]


def loaded(params: list[nn.Parameter], saved: Any, **kept: Any) -> tuple[Any, list[str]]:
    optimizer = adamw(params, **kept)
    with remarks() as found:
        optimizer.load_state_dict(saved)
    return optimizer, found


class TestItsOwnForm:
    @each_backend
    @pytest.mark.parametrize("master", MASTERS)
    @pytest.mark.parametrize("state_dtype", ["bfloat16", "float16", "int8"])
    def test_a_training_goes_on_with_the_same_bits(self, backend: str, state_dtype: str, master: Any) -> None:
        kept = dict(state_dtype=state_dtype, master=master, stochastic_rounding={"seed": 3}, ema={"decay": 0.9})
        params = made(BF16)
        whole = adamw(params, **kept, backend=backend)
        step(params, whole, 0, 1, 2)
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        again = twin(params)
        file.seek(0)
        resumed, said = loaded(again, torch.load(file, weights_only=True), **kept, backend=backend)
        assert said == []
        assert contents(resumed) == contents(whole)
        copied = copy.deepcopy(whole)
        unpickled = pickle.loads(pickle.dumps(whole))
        others = [(again, resumed)] + [(each.param_groups[0]["params"], each) for each in (copied, unpickled)]
        for own, optimizer in [(params, whole), *others]:
            step(own, optimizer, 3, 4)
        for own, optimizer in others:
            assert bits(own) == bits(params)
            assert contents(optimizer) == contents(whole)

    @each_backend
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_sgd_keeps_the_count_where_it_matters(self, backend: str, momentum: float) -> None:
        kept = dict(momentum=momentum, master="split8", stochastic_rounding=True, ema={"decay": 0.5, "begin": 4})
        params = made(BF16)
        whole = fusedopt.FusedSGD(params, lr=0.1, **kept, backend=backend)
        step(params, whole, 0, 1, 2)
        assert "step" not in whole.state[params[0]]
        saved = copy.deepcopy(whole.state_dict())
        assert saved["state"][0]["step"] == 3
        again = twin(params)
        resumed = fusedopt.FusedSGD(again, lr=0.1, **kept, backend=backend)
        resumed.load_state_dict(saved)
        for own, optimizer in ((params, whole), (again, resumed)):
            step(own, optimizer, 3, 4, 5, 6)
        assert bits(again) == bits(params)
        assert contents(resumed) == contents(whole)
        del saved["state"][0]["step"]
        with pytest.raises(ValueError, match="has 'ema' and no 'step'"):
            resumed.load_state_dict(saved)

    def test_what_no_step_has_touched_is_left_out(self) -> None:
        params = made(BF16)
        optimizer = adamw(params, state_dtype="int8", master="split", ema={"decay": 0.9}, backend=BACKENDS[-1])
        set_gradients(params, 0)
        params[0].grad[0] = torch.inf
        optimizer.step(grad_scale=2.0)
        assert optimizer.state_dict()["state"] == {}

    @pytest.mark.parametrize("key", ["exp_avg_codes", "exp_avg_sq_codes", "master_low", "ema", "step"])
    def test_half_a_state_is_an_error(self, key: str) -> None:
        params = made(BF16)
        kept = dict(state_dtype="int8", master="split", ema={"decay": 0.9})
        optimizer = adamw(params, **kept)
        step(params, optimizer, 0)
        saved = copy.deepcopy(optimizer.state_dict())
        before = contents(optimizer)
        del saved["state"][1][key]
        with pytest.raises(ValueError, match=rf"loaded state of parameter.*\[1\].* has no '{key}'"):
            optimizer.load_state_dict(saved)
        assert contents(optimizer) == before

    @pytest.mark.parametrize("state_dtype", ["int8", "bfloat16"])
    def test_codes_of_a_wrong_size_are_an_error(self, state_dtype: str) -> None:
        params = made()
        source = adamw(params, state_dtype="int8")
        step(params, source, 0)
        for wrong in (torch.zeros(3, dtype=torch.uint8), torch.zeros(116), "codes"):
            saved = copy.deepcopy(source.state_dict())
            saved["state"][1]["exp_avg_sq_codes"] = wrong
            expected = r"loaded state 'exp_avg_sq_codes' of parameter.*\[1\].*expected"
            with pytest.raises(ValueError, match=expected):
                adamw(twin(params), state_dtype=state_dtype).load_state_dict(saved)

    @pytest.mark.parametrize("state_dtype", ["int8", "bfloat16"])
    @pytest.mark.parametrize("shape", [(8, 4), (3, 9), (20,), (32,), (4, 8, 1)])
    def test_codes_of_another_shape_are_an_error(self, shape: Any, state_dtype: str) -> None:
        params = made(shapes=[(4, 8)])
        source = adamw(params, state_dtype="int8")
        step(params, source, 0)
        saved = copy.deepcopy(source.state_dict())
        others = adamw(made(shapes=[shape]), state_dtype=state_dtype)
        with pytest.raises(ValueError, match=r"'codes_shape' of parameter.* is \[4, 8\]; expected \["):
            others.load_state_dict(saved)
        assert not others.state
        del saved["state"][0][CODES_SHAPE]  # of an older version
        loaded(twin(params), saved, state_dtype=state_dtype)

    def test_one_state_in_two_forms_is_an_error(self) -> None:
        params = made()
        source = adamw(params, state_dtype="int8")
        step(params, source, 0)
        saved = copy.deepcopy(source.state_dict())
        saved["state"][0]["exp_avg"] = torch.zeros(70)
        with pytest.raises(ValueError, match="'exp_avg' and 'exp_avg_codes', which is one state in two forms"):
            source.load_state_dict(saved)

    def test_the_state_of_another_optimizer_is_an_error(self) -> None:
        params = made()
        sgd = fusedopt.FusedSGD(params, lr=0.1, momentum=0.9, state_dtype="int8")
        step(params, sgd, 0)
        saved = adamw(twin(params)).state_dict()
        saved["state"] = sgd.state_dict()["state"]
        for kept in ({}, {"state_dtype": "int8"}):
            with pytest.raises(ValueError, match=r"has no 'step'|'momentum_buffer_codes'"):
                adamw(twin(params), **kept).load_state_dict(saved)

    def test_codes_know_the_order_that_they_are_in(self) -> None:
        (flat,) = made(shapes=[(2, 3, 8, 9)])
        last = nn.Parameter(flat.detach().to(memory_format=torch.channels_last))
        optimizer = adamw([last], state_dtype="int8")
        step([last], optimizer, 0, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        assert saved["state"][0][CODES_ORDER] == [0, 2, 3, 1]
        same, said = loaded([nn.Parameter(last.detach().clone())], saved, state_dtype="int8")
        assert not said
        assert contents(same) == contents(optimizer)
        other, said = loaded([nn.Parameter(last.detach().contiguous())], saved, state_dtype="int8")
        assert said == ["fusedopt: codes are made anew for another memory format"]
        for mine, theirs in zip(values(other), values(optimizer), strict=True):
            assert (mine - theirs).abs().max() <= theirs.abs().max() / 16
        plain, _ = loaded([nn.Parameter(last.detach().contiguous())], saved, state_dtype="float32")
        for mine, theirs in zip(values(plain), values(optimizer), strict=True):
            assert torch.equal(mine, theirs)
        saved["state"][0][CODES_ORDER] = [0, 1]
        with pytest.raises(ValueError, match=CODES_ORDER):
            optimizer.load_state_dict(saved)

    @each_backend
    def test_another_memory_format_is_noticed(self, backend: str) -> None:
        params = made(shapes=[(2, 3, 8, 9)])
        optimizer = adamw(params, state_dtype="int8", backend=backend)
        step(params, optimizer, 0, 1)
        codes = optimizer.state[params[0]]["exp_avg_codes"]
        before = decode(codes, "int8", 432).view(params[0].shape)
        for of in (optimizer, loaded(params, optimizer.state_dict(), state_dtype="int8", backend=backend)[0]):
            params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
            saved = of.state_dict()
            set_gradients(params, 2)
            with pytest.raises(RuntimeError, match="memory format was changed"):
                of.step()
            with remarks():
                of.load_state_dict(saved)
            moments = of.state_dict(as_torch=True)["state"][0]["exp_avg"]
            torch.testing.assert_close(moments, before, atol=0.05 * float(before.abs().max()), rtol=0.1)
            of.step()
            params[0].data = params[0].data.contiguous()


class TestTorchs:
    @each_backend
    @pytest.mark.parametrize("cls", ["SGD", "AdamW"])
    def test_it_goes_on_from_ours_and_ours_from_it(self, cls: str, backend: str) -> None:
        settings: Any = {"lr": 0.01, **({"momentum": 0.9} if cls == "SGD" else {"amsgrad": True})}
        params = made()
        kept = dict(state_dtype="int8", ema={"decay": 0.9}, backend=backend)
        ours = getattr(fusedopt, f"Fused{cls}")(params, **settings, **kept)
        step(params, ours, 0, 1, 2)
        saved = copy.deepcopy(ours.state_dict(as_torch=True))
        theirs = getattr(torch.optim, cls)(twins := twin(params), **settings, foreach=False)
        step(twins, theirs, 0)
        assert {key for entry in saved["state"].values() for key in entry} == set(theirs.state[twins[0]])
        theirs.load_state_dict(copy.deepcopy(saved))  # of which it takes the tensors
        assert {value.dtype for entry in saved["state"].values() for value in entry.values()} == {FP32}
        exact = getattr(fusedopt, f"Fused{cls}")(more := twin(params), **settings, backend=backend)
        with torch.no_grad():
            for param, own in zip(twins, params, strict=True):
                param.copy_(own)
        exact.load_state_dict(saved)
        for own, optimizer in ((twins, theirs), (more, exact)):
            step(own, optimizer, 3, 4)
        for one, other in zip(twins, more, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        back = getattr(fusedopt, f"Fused{cls}")(twin(params), **settings, **kept)
        with remarks() as said:
            back.load_state_dict(saved)
        begins = "the loaded state has no ema: the average begins with the weights"
        maxima = "loaded max_exp_avg_sq (float32) is kept as bfloat16 here; " if cls == "AdamW" else ""
        assert said == [f"fusedopt: {maxima}{begins}"]
        assert [{key: each for key, each in entry.items() if "codes" in key} for entry in contents(back)] == [
            {key: each for key, each in entry.items() if "codes" in key} for entry in contents(ours)
        ]

    def test_it_does_not_go_on_from_codes(self) -> None:
        params = made()
        ours = adamw(params, state_dtype="int8")
        step(params, ours, 0)
        theirs = torch.optim.AdamW(twins := twin(params), lr=0.05)
        theirs.load_state_dict(ours.state_dict())
        before = bits(twins)
        set_gradients(twins, 1)
        with pytest.raises(KeyError, match="exp_avg"):
            theirs.step()
        assert bits(twins) == before

    @pytest.mark.parametrize("dtype", [FP32, FP16, BF16, torch.float64])
    @pytest.mark.parametrize("state_dtype", STATES)
    def test_moments_of_any_dtype_are_taken(self, state_dtype: Any, dtype: torch.dtype) -> None:
        params = made()
        theirs = torch.optim.AdamW(params, lr=0.05)
        step(params, theirs, 0, 1)
        saved = theirs.state_dict()
        for entry in saved["state"].values():
            entry.update({key: entry[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")})
        optimizer, _ = loaded(again := twin(params), saved, state_dtype=state_dtype)
        step(again, optimizer, 2)
        assert all(param.isfinite().all() for param in again)

    def test_beyond_float16_is_an_error(self) -> None:
        params = made()
        theirs = torch.optim.AdamW(params, lr=0.05)
        step(params, theirs, 0)
        saved = theirs.state_dict()
        saved["state"][0]["exp_avg"][3] = 1e5
        with pytest.raises(ValueError, match=r"'exp_avg' of parameter.*\[0\].*beyond those of float16"):
            adamw(twin(params), state_dtype="float16").load_state_dict(saved)


class TestConversion:
    @pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
    def test_moments_are_rounded_once(self, before: Any, after: Any) -> None:
        params = made()
        source = adamw(params, state_dtype=before)
        step(params, source, 0, 1, 2)
        target, said = loaded(again := twin(params), source.state_dict(), state_dtype=after)
        same = before == after
        if not isinstance(before, dict) and not isinstance(after, dict):
            same = same or {before, after} == {None, "float32"}
        assert (said == []) == same
        assert len(said) <= 1
        for given, mine in zip(values(source), values(target), strict=True):
            bound = given.abs().max() / 16 + 1e-7  # a code of 8 bits, of the largest in a block
            assert (mine - given).abs().max() <= bound
            if same:
                assert torch.equal(mine, given)
        step(again, target, 3)

    @pytest.mark.parametrize("before", ["bfloat16", "float16", "int8"])
    def test_back_to_none_is_as_wide_as_the_parameter(self, before: str) -> None:
        params = made()
        source = adamw(params, state_dtype=before)
        step(params, source, 0)
        target, said = loaded(again := twin(params), source.state_dict())
        assert said == [f"fusedopt: loaded exp_avg ({before}), exp_avg_sq ({before}) are kept as float32 here"]
        assert {target.state[param][key].dtype for param in again for key in ("exp_avg", "exp_avg_sq")} == {FP32}
        narrow = [nn.Parameter(param.detach().to(BF16)) for param in params]
        target, said = loaded(narrow, adamw_saved(params), state_dtype=None)
        assert said == []
        assert target.state[narrow[0]]["exp_avg"].dtype == FP32

    @pytest.mark.parametrize(("before", "after"), list(itertools.product(MASTERS, MASTERS)))
    @pytest.mark.parametrize("weights_first", [True, False])
    def test_masters(self, before: Any, after: Any, weights_first: bool) -> None:
        params = made(BF16)
        source = adamw(params, master=before)
        step(params, source, 0, 1, 2)
        again = twin(params) if weights_first else made(BF16, seed=9)
        target, said = loaded(again, source.state_dict(), master=after)
        assert (said == []) == (before == after or (before, after) == ("float32", "split"))
        with torch.no_grad():
            for mine, given in zip(again, params, strict=True):
                mine.copy_(given)
        kept, loose = source.master_weights(), target.master_weights()
        for given, mine in zip(params, again, strict=True):
            if before is None or after is None:
                assert torch.equal(loose[mine], given.float())
            elif after == "split8":
                assert (loose[mine] - kept[given]).abs().max() <= kept[given].abs().max() * 2**-16
            else:
                assert torch.equal(loose[mine], kept[given])
        whole = twin(params)
        step(again, target, 3)
        assert "master" not in target.state[again[0]] or after == "float32"
        assert "master_low" not in target.state[again[0]] or after in ("split", "split8")
        if before == after:
            step(params, source, 3)
            assert bits(params) == bits(again)
        else:
            assert bits(whole) != bits(again)

    def test_a_master_of_other_weights_cannot_be_split(self) -> None:
        params = made(BF16)
        source = adamw(params, master="float32")
        step(params, source, 0)
        target, _ = loaded(again := made(BF16, seed=9), source.state_dict(), master="split")
        before = bits(again)
        set_gradients(again, 1)
        with pytest.raises(RuntimeError, match=r"state 'master' of parameter.* rounds to other values"):
            target.step()
        assert bits(again) == before

    def test_half_of_the_masters_or_averages_is_an_error(self) -> None:
        params = made(BF16)
        source = adamw(params, master="float32", ema={"decay": 0.9})
        step(params, source, 0)
        for key in ("master", "ema"):
            saved = copy.deepcopy(source.state_dict())
            del saved["state"][2][key]
            for master in ("float32", "split"):
                with pytest.raises(ValueError, match=r"has no 'ema'|has no 'master"):
                    adamw(twin(params), master=master, ema={"decay": 0.9}).load_state_dict(saved)

    def test_the_average_begins_with_the_weights_of_the_next_step(self) -> None:
        params = made(BF16)
        source = adamw(params, master="split")
        step(params, source, 0, 1)
        target, said = loaded(again := made(BF16, seed=9), source.state_dict(), master="split", ema={"decay": 0.75})
        assert said == ["fusedopt: the loaded state has no ema: the average begins with the weights"]
        with torch.no_grad():
            for mine, given in zip(again, params, strict=True):
                mine.copy_(given)
        assert all(torch.equal(target.averages()[param], param) for param in again)
        saved = target.state_dict()["state"][0]["ema"]
        before = target.master_weights()
        assert torch.equal(saved, before[again[0]])
        step(again, target, 2)
        after = target.master_weights()
        for param in again:
            torch.testing.assert_close(target.state[param]["ema"], torch.lerp(before[param], after[param], 0.25))

    def test_what_is_left_out_is_said_in_one_line(self) -> None:
        params = made(BF16)
        source = adamw(params, state_dtype="int8", master="split", ema={"decay": 0.9})
        step(params, source, 0)
        _, said = loaded(twin(params), source.state_dict(), state_dtype="bfloat16")
        assert said == [
            "fusedopt: loaded exp_avg (int8), exp_avg_sq (int8) are kept as bfloat16 here; the loaded master is left "
            "out, and weights go on as the parameters have them; the loaded ema is left out"
        ]

    @pytest.mark.parametrize("form", ["int8", "int8_unsigned", "float16_root"])
    @pytest.mark.parametrize("by_chance", [False, True])
    def test_what_was_decoded_is_encoded_to_the_same(self, form: str, by_chance: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        for numel in (0, 1, 63, 64, 65, 100 * CODE_BLOCK):
            spread = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator) ** 8
            given = spread if form == "int8" else spread.square()
            random = torch.randint(0, 2**16, (numel,), generator=generator) if by_chance else None
            stored = encode(given, form, random)
            assert stored.dtype == FORMS[form]
            assert torch.equal(encode_again(decode(stored, form, numel), form), stored)

    def test_the_bits_that_a_parameter_lacks(self) -> None:
        master = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
        master[:4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
        master.view(torch.int32)[4:100] = (master.view(torch.int32)[4:100] & -65536) | 0x8000  # half way
        param = nn.Parameter(master.to(BF16))
        low = low_of(param, "master", master, torch.int16)
        assert low is not None
        joined = master_of(param, {"master_low": low})
        assert torch.equal(joined[100:], master[100:])
        distance = joined.view(torch.int32)[4:100] - master.view(torch.int32)[4:100]
        assert distance.abs().max() <= 1, "one unit in the last place"
        eight = low_of(param, "master", master, torch.uint8)
        assert eight is not None
        close = master_of(param, {"master_low": eight})
        assert ((close[100:] - master[100:]).abs() <= master[100:].abs() * 2**-15).all()
        assert torch.equal(low_of(param, "master_low", low, torch.uint8), eight)
        back = low_of(param, "master_low", eight, torch.int16)
        assert torch.equal(master_of(param, {"master_low": back}), close) or close.isnan().any()
        assert low_of(nn.Parameter(-param.detach()), "master", master, torch.int16) is None


class TestTakingOver:
    @each_backend
    def test_fuse_converts_and_unfuse_decodes(self, backend: str) -> None:
        params = made(BF16)
        theirs = torch.optim.AdamW(params, lr=0.05, foreach=False)
        step(params, theirs, 0, 1)
        kept = dict(state_dtype="int8", master="split8", ema={"decay": 0.9})
        with remarks() as said:
            ours = fusedopt.fuse(theirs, **kept, backend=backend)
        assert said == []
        step(params, ours, 2)
        assert set(ours.state[params[0]]) == {"step", "exp_avg_codes", "exp_avg_sq_codes", "master_low", "ema"}
        decoded = values(ours)
        back = fusedopt.unfuse(ours)
        assert set(back.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
        moments = [back.state[param][key] for param in params for key in ("exp_avg", "exp_avg_sq")]
        assert bits(moments) == bits([each.to(BF16) for each in decoded])
        step(params, back, 3)

    def test_fuse_that_fails_changes_nothing(self) -> None:
        params = made()
        theirs = torch.optim.AdamW(params, lr=0.05)
        step(params, theirs, 0)
        theirs.state[params[3]]["exp_avg"].view(-1)[0] = 1e6
        before = [dict(theirs.state[param]) for param in params]
        with pytest.raises(ValueError, match="beyond those of float16"):
            fusedopt.fuse(theirs, state_dtype="float16")
        for param, entry in zip(params, before, strict=True):
            assert theirs.state[param].keys() == entry.keys()
            assert all(theirs.state[param][key] is value for key, value in entry.items())
        step(params, theirs, 1)

    @each_backend
    def test_fused_sgd_goes_on_counting(self, backend: str) -> None:
        params = made(BF16)
        theirs = torch.optim.SGD(params, lr=0.05, momentum=0.9)
        step(params, theirs, 0)
        ours = fusedopt.fuse(theirs, state_dtype="int8", stochastic_rounding=True, backend=backend)
        step(params, ours, 1)
        assert ours.state_dict()["state"][0]["step"] == 2


class TestBytes:
    @pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64])
    @pytest.mark.parametrize("state_dtype", STATES)
    @pytest.mark.parametrize("ema", [None, {"decay": 0.9, "interval": 2}])
    def test_what_is_counted_is_there_after_a_step(self, dtype: Any, state_dtype: Any, ema: Any) -> None:
        params = made(dtype)
        master = "split8" if dtype == BF16 else None
        optimizer = adamw(
            [*params, nn.Parameter(torch.zeros(5, dtype=dtype), requires_grad=False)],
            state_dtype=state_dtype,
            master=master,
            ema=ema,
            amsgrad=True,
        )
        counted = optimizer.bytes_per_parameter()
        step(params, optimizer, 0)
        assert optimizer.bytes_per_parameter() == counted
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        tensors = [*optimizer.param_groups[0]["params"], *(param.grad for param in params), *state]
        assert sum(each.numel() * each.element_size() for each in tensors) == round(counted.held * counted.elements)
        grads = counted.gradients
        assert counted.moved_full == counted.moved_check == counted.moved_bare + grads
        average = counted.average / 2 if ema else 0
        rest = counted.parameters - counted.frozen + counted.states + counted.carried - counted.average
        assert counted.moved_bare == pytest.approx(2 * (rest + average) + grads)
        optimizer.write_back_grads = True
        assert optimizer.bytes_per_parameter().moved_bare == pytest.approx(counted.moved_bare + grads)

    def test_the_recipes(self) -> None:
        found = {name: (memory.held, memory.moved_full) for name, memory in memory_of_each().items()}
        assert found["float32"] == pytest.approx((16, 32), rel=1e-4)
        assert found["float32, states in bfloat16"] == pytest.approx((12, 24), rel=1e-4)
        assert found["bfloat16, master in float32, states in float32"] == pytest.approx((16, 32), rel=1e-4)
        assert found["bfloat16, master split, states in bfloat16"] == pytest.approx((10, 20), rel=1e-4)
        assert found["bfloat16, master split, states in int8"][0] <= 8.2
        assert found["bfloat16, master split8, states in int8"][0] <= 7.2

    @pytest.mark.slow
    @pytest.mark.skipif(module is None, reason="the compiled module is missing, and the reference works in float32")
    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
    def test_the_process_holds_what_is_counted(self) -> None:
        found = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True).stdout
        held, counted = map(float, found.split())
        assert counted <= 7.2
        assert held == pytest.approx(counted, abs=0.3)
