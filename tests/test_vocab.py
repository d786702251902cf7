"""Test the linear losses with a head that is cut among the ranks of a group, on gloo (``vocab_job.py``)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from launch import launch

import dmfast
from dmfast.kernels.shards import sums_of_sequences, whole_rows

HERE, RANKS = Path(__file__).parent, 2
# this is how far a result may be from fp64 on the same tensors: loss, log pi and entropy in nats, gradients relative to
# their largest value
WITHIN = {"fp32": 2e-5, "bf16": 1e-3, "bf16 same": 0.1, "fp16": 1e-3, "fp16, unscaled": 1e-3, "fp64": 1e-13}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what each rank found."""
    out = tmp_path_factory.mktemp("vocab") / "found.json"
    done = launch(HERE / "vocab_job.py", str(out), processes=RANKS)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert len(found) == RANKS
    return found


def test_ranks_together_are_one_process(ranks):
    """Values and gradients are as near to fp64 as one process's are, and the same bits on all ranks."""
    for rank in ranks:
        for name, errors in rank["cases"].items():
            assert errors.pop("same"), f"{name}: A, the loss or hidden's gradient differ between ranks"
            bound = WITHIN.get(name, WITHIN["fp32"])
            for what, found in errors.items():
                if what in ("rank", "columns"):
                    continue
                one, cut = found
                gradient = what in ("hidden", "head", "bias")
                own = {"bf16": 1e-2, "bf16 same": 2e-2, "fp16": 1e-3, "fp16, unscaled": 1e-3}.get(name, bound)
                assert cut <= max(1.5 * one, own / 10 if gradient else bound / 10), (name, what, one, cut)
                assert cut < (own if gradient else bound), (name, what, one, cut)


def test_shards_need_not_be_equal(ranks):
    columns = [rank["cases"]["uneven, bias"]["columns"] for rank in ranks]
    assert sum(columns) == 41 and len(set(columns)) == len(ranks)


@pytest.mark.parametrize(("case", "columns"), [("one chunk", 2), ("known weight", 2), ("entropy", 3), ("chunks", 2)])
def test_what_ranks_exchange(ranks, case, columns):
    """Ranks exchange 16 bytes a row and chunk, 24 with the entropy, and sum the gradient of hidden once a call."""
    for found in (rank["exchanged"][case] for rank in ranks):
        arguments, *chunks, gradient = found["calls"]
        assert arguments == ["all_gather", "torch.int64", [32]]
        assert gradient[:2] == ["all_reduce", "torch.float32"] and math.prod(gradient[2]) == found["hidden"]
        assert {(name, dtype, shape[0]) for name, dtype, shape in chunks} == {("all_gather", "torch.float64", columns)}
        assert sum(rows - 1 for _, _, (_, rows) in chunks) == found["rows"]  # one more element says who has failed
        assert len(chunks) == (3 if case == "chunks" else 1)


@pytest.mark.parametrize(("fault", "first", "other"), [
    ("nan_in_one", "ValueError: logits hold NaN or +inf at (sequence 0, position 0)", "rank 1 of the group has failed"),
    ("label_of_probability_0", "ValueError: the logit of token 0 at (sequence 0, position 0) is -inf",
     "rank 0 of the group has failed: its own error says why"),
    ("other_tokens", "ValueError: all ranks of the group must get the same tokens or mask, and rank 1 got", None),
    ("other_target", "ValueError: all ranks of the group must get the same log_target, log_proposal", None),
    ("other_temperature", "ValueError: all ranks of the group must get the same temperature or softcap", None),
    ("other_token_weight", "ValueError: all ranks of the group must get the same token_weight, and rank 1 got", None),
    ("overlap", "ValueError: the rows of weight on the ranks must make a vocabulary", None),
    ("wrong_dtype", "TypeError: weight must have the dtype of hidden", "rank 0 of the group has refused its arguments"),
    ("token_too_large", "ValueError: tokens holds 41 at (sequence 1, position 2); a token id must be in [0, 41)", None),
    ("breaks_within", "MemoryError: no memory for this chunk", "rank 1 of the group has failed"),
])  # fmt: skip
def test_a_fault_of_one_rank_ends_all(ranks, fault, first, other):
    """Each rank raises, so that none waits for ever. The one that is wrong says why."""
    found = [rank["faults"][fault] for rank in ranks]
    assert sum(said.startswith(first) for said in found) == (len(ranks) if other is None else 1), found
    assert other is None or sum(other in said for said in found) == len(ranks) - 1, found


def test_what_a_device_has_recorded_is_raised_on_every_rank(ranks):
    assert all("ValueError: logits hold NaN or +inf" in rank["faults"]["recorded"] for rank in ranks)


def test_a_head_that_is_cut_otherwise_is_refused(ranks):
    assert all(r["replicated"].startswith("ValueError: weight is a DTensor with placements (Repl") for r in ranks)


# --- without a group


def test_rows_of_which_some_shards_hold_nothing():
    """A shard whose logits are all -inf counts for nothing. A row of only -inf gives -inf and no NaN."""
    inf = torch.inf
    parts = torch.tensor([[[-inf, -inf], [0.0, 0.0], [0.0, 0.0]], [[2.0, -inf], [1.0, -inf], [0.5, 0.0]]]).double()
    lse, label, entropy = whole_rows(parts)
    assert lse.tolist() == [2.0, -inf] and label.tolist() == [1.0, -inf] and entropy[0] == 0.5


def test_sums_of_sequences_that_are_empty():
    rows = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]).double()
    starts = torch.tensor([0, 0, 2, 3, 3])
    assert sums_of_sequences(rows, starts).tolist() == [[0.0, -3.0, -4.0, 0.0], [0.0] * 4]
    assert sums_of_sequences(rows[:, :0], torch.tensor([0, 0])).tolist() == [[0.0], [0.0]]


def test_a_group_is_needed_and_torch_distributed_with_it():
    hidden, weight, tokens = torch.zeros(1, 2, 3), torch.zeros(4, 3), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="vocab_start needs group"):
        dmfast.linear_sequence_log_prob(hidden, weight, tokens, vocab_start=4)
    with pytest.raises(RuntimeError, match="is not initialised: call init_process_group"):
        dmfast.linear_sequence_log_prob(hidden, weight, tokens, group=object())
