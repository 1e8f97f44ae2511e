"""The mutation tester, on a kernel whose every line is needed, and on a check that is half asleep."""

import numpy as np
import pytest
from host import build, mutants
from host.executor import Kernel, device_array, device_empty
from host.nvrtc import compile_ptx
from host.samples import sample_text

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing())

TEXT = sample_text("rows")


def check(text, *, checked=True, seeds=(0, 1, 7)):
    """Two blocks and a size that is no multiple of anything: tails are reached, and blocks take several rows."""
    kernel = Kernel(text, "row_sums", checked=checked)
    kernel.most_steps = 1 << 22  # a mutant that never ends is soon found out
    x = np.arange(5 * 77, dtype=np.float32).reshape(5, 77)
    for seed in seeds:
        sums = device_empty(5, np.float32, "sums")
        kernel((2,), (64,), (device_array(x), sums, np.int32(5), np.int32(77)), seed=seed)
        np.testing.assert_array_equal(sums, x.sum(axis=1))


def drowsy(text):
    check(text, checked=False, seeds=(0,))


def subjects():
    """For the command line."""
    return [mutants.Subject("row_sums", TEXT, check, lambda text: _code(text)), mutants.Subject("drowsy", TEXT, drowsy)]


def _code(text):
    """PTX without the marks of source columns."""
    ptx = compile_ptx(text, "row_sums", {}, 80)
    return "\n".join(line for line in ptx.splitlines() if not line.lstrip().startswith(".loc"))


def test_every_break_of_the_sample_is_caught():
    verdicts = mutants.survey(subjects()[0])
    assert mutants.complaints(subjects()[0], verdicts) == []
    outcomes = {verdict.mutant.change: verdict.outcome for verdict in verdicts}
    assert outcomes["delete __syncthreads();"] == "caught"
    assert len(verdicts) > 15
    assert sum(verdict.outcome == "caught" for verdict in verdicts) > 12
    text = "\n".join(map(str, verdicts))
    assert "Fault: row_sums: race in shared memory" in text
    assert "AssertionError" in text


def test_a_check_without_the_checker_lets_barriers_go():
    verdicts = mutants.survey(subjects()[1], ["barriers"])
    survivors = [verdict.mutant for verdict in verdicts if verdict.outcome == "survived"]
    assert survivors
    assert all(mutant.place.startswith("rows.cu(") for mutant in survivors)

    key = survivors[0].key
    excused = mutants.Subject("excused", TEXT, drowsy, redundant={key: "a reason"})
    assert [v.outcome for v in verdicts].count("survived") - 1 == len(
        mutants.complaints(excused, mutants.survey(excused, ["barriers"]))
    )
    wrong = mutants.Subject("wrong", TEXT, check, redundant={key: "a reason"})
    assert mutants.complaints(wrong, mutants.survey(wrong, ["barriers"])) == [f"declared redundant, but is not: {key}"]


def test_mutants_differ_in_one_place_and_leave_comments_and_headers_alone():
    text = '#line 1 "a.cuh"\nint a = 1 + 1;\n#line 7 "b.cu"\n// x < 1\nif (a < 1 && f<T>(b)) __syncthreads();\n'
    found = list(mutants.mutants(text))
    assert {(m.place, m.change) for m in found} == {
        ("a.cuh(1)", "+ -> -"),
        ("a.cuh(1)", "+ 1 -> nothing"),
        ("b.cu(8)", "< -> <="),
        ("b.cu(8)", "&& -> ||"),
        ("b.cu(8)", "delete __syncthreads();"),
        ("b.cu(8)", "negate a < 1 && f<T>(b)"),
    }
    for mutant in found:
        changed = [pair for pair in zip(text.splitlines(), mutant.text.splitlines(), strict=True) if len(set(pair)) > 1]
        assert len(changed) == 1
    assert {m.place for m in mutants.mutants(text, files=["a.cuh"])} == {"a.cuh(1)"}
    assert not list(mutants.mutants(text, ["barriers"], files=["a.cuh"]))


def test_a_check_that_fails_the_unbroken_kernel_is_an_error():
    broken = TEXT.replace("sums[row] = total", "sums[row] = total + 1.f")
    assert broken != TEXT
    with pytest.raises(AssertionError):
        mutants.survey(mutants.Subject("broken", broken, check))


def test_the_command_line_reports_survivors(capfd):
    assert mutants.main(["test_host_mutants:subjects", "--kinds", "barriers", "--survivors-only"]) == 1
    out = capfd.readouterr().out
    assert "row_sums: 2 mutants: 2 caught" in out
    assert "survived          rows.cu(" in out
    assert "drowsy: survived: rows.cu(" in out
