"""The mutation tester, on a kernel whose every line is needed, and on a check that is half asleep."""

import re

import cuda_mutants
import numpy as np
import pytest
from host import build, mutants
from host.executor import Kernel, device_array, device_empty
from host.nvrtc import compile_ptx
from host.samples import sample_text

from cubn.machines.cuda.source import kernel_folder, translation_unit

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
    return [
        mutants.Subject("row_sums", TEXT, [mutants.Check(check, _code)]),
        mutants.Subject("drowsy", TEXT, [mutants.Check(drowsy)]),
    ]


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
    excused = mutants.Subject("excused", TEXT, [mutants.Check(drowsy)], redundant={key: "a reason"})
    assert [v.outcome for v in verdicts].count("survived") - 1 == len(
        mutants.complaints(excused, mutants.survey(excused, ["barriers"]))
    )
    wrong = mutants.Subject("wrong", TEXT, [mutants.Check(check)], redundant={key: "a reason"})
    assert mutants.complaints(wrong, mutants.survey(wrong, ["barriers"])) == [f"declared redundant, but is not: {key}"]


def fussy(text):
    """Passes the original alone."""
    assert text == TEXT


def test_what_is_declared_redundant_must_be_so_among_the_kinds_surveyed():
    """Of the others nothing is known, but a mutant that no kind has is always out of date."""
    barrier, bound = (next(mutants.mutants(TEXT, [kind])).key for kind in ("barriers", "bounds"))
    stale = "delete __syncthreads(); in: a line that is no more"
    subject = mutants.Subject("fussy", TEXT, [mutants.Check(fussy)], redundant=dict.fromkeys((barrier, bound, stale)))

    def complaints(*kinds):
        return mutants.complaints(subject, mutants.survey(subject, kinds), kinds)

    assert complaints("barriers") == [f"declared redundant, but is not: {key}" for key in (barrier, stale)]
    assert complaints("bounds") == [f"declared redundant, but is not: {key}" for key in (bound, stale)]
    assert complaints("logic") == [f"declared redundant, but is not: {stale}"]
    assert len(complaints(*mutants.KINDS)) == 3


def test_mutants_of_equal_lines_have_keys_of_their_own():
    """Otherwise the reason for one would excuse the others."""
    text = '#line 1 "a.cu"\n__syncthreads();\na = b;\n  __syncthreads();\nfor (; i < n && j < m;) ++i;\n'
    assert [mutant.key for mutant in mutants.mutants(text, ["barriers", "bounds"])] == [
        "delete __syncthreads(); in: __syncthreads();",
        "delete __syncthreads(); in: __syncthreads(); #2",
        "< -> <= in: for (; i < n && j < m;) ++i;",
        "< -> <= in: for (; i < n && j < m;) ++i; #2",
    ]


def test_a_check_is_left_out_where_it_would_run_the_code_of_the_original():
    """Every check of a mutant like that, and it is "same code"; some of them, and the others decide."""
    broken = list(mutants.mutants(TEXT))
    blind, seen = mutants.Check(fussy, lambda text: "as ever"), []
    assert {mutants.judge(mutants.Subject("", TEXT, [blind]), m).outcome for m in broken} == {"same code"}
    other = mutants.Check(seen.append, lambda text: text)
    assert {mutants.judge(mutants.Subject("", TEXT, [blind, other]), m).outcome for m in broken} == {"survived"}
    assert seen == [mutant.text for mutant in broken]


def test_the_check_that_caught_most_comes_first():
    order = []

    def look(name, catches):
        def run(text):
            order.append(name)
            assert text == TEXT or not catches

        return mutants.Check(run)

    subject = mutants.Subject("", TEXT, [look("sleeps", False), look("wakes", True)])
    verdicts = [mutants.judge(subject, mutant) for mutant in list(mutants.mutants(TEXT))[:3]]
    assert [verdict.outcome for verdict in verdicts] == ["caught"] * 3
    assert order == ["sleeps", "wakes", "wakes", "wakes"]


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
        mutants.survey(mutants.Subject("broken", broken, [mutants.Check(check)]))


def test_the_command_line_reports_survivors(capfd):
    assert mutants.main(["test_host_mutants:subjects", "--kinds", "barriers", "--survivors-only"]) == 1
    out = capfd.readouterr().out
    assert re.search(r"^row_sums: 2 mutants: 2 caught; \d+ s$", out, re.MULTILINE)
    assert "survived          rows.cu(" in out
    assert "drowsy: survived: rows.cu(" in out


def test_the_command_line_takes_subjects_by_name(capfd):
    command = ["test_host_mutants:subjects", "--kinds", "barriers", "--processes", "1", "--only"]
    assert mutants.main([*command, "row_sums"]) == 0
    out = capfd.readouterr().out
    assert "row_sums: 2 mutants" in out
    assert "drowsy" not in out
    with pytest.raises(SystemExit):
        mutants.main([*command, "row_sum"])
    assert "there is no subject row_sum; there are row_sums, drowsy" in capfd.readouterr().err


def test_every_kernel_file_is_broken_and_no_reason_has_lost_its_mutant():
    """What `make mutants` finds out in half an hour, of a text that has changed since, is seen here at once."""
    assert set(cuda_mutants.CHECKED_WITH) == {path.name for path in kernel_folder().iterdir()}
    for file, reasons in cuda_mutants.REDUNDANT.items():
        keys = {mutant.key for mutant in mutants.mutants(cuda_mutants.file_text(file))}
        assert set(reasons) <= keys, file


def test_a_broken_line_is_broken_in_the_kernels_that_reach_it():
    for file, all_whose in cuda_mutants.CHECKED_WITH.items():
        mutant = next(mutants.mutants(cuda_mutants.file_text(file)))
        for whose in all_whose:
            kernel = whose.partition(",")[0]
            old = translation_unit(f"{kernel}.cu").splitlines()
            new = cuda_mutants.kernel_text(kernel, file, mutant.text).splitlines()
            changed = [pair for pair in zip(old, new, strict=True) if len(set(pair)) > 1]
            assert [before.strip() for before, _ in changed] == [mutant.line]
