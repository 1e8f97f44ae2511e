"""The CUDA sources: found everywhere, pasted into one text, and the merge they share with Python."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from cubn.machines.cuda.source import kernel_folder, translation_unit
from cubn.moments import Moments

COMPILER = shutil.which("g++") or shutil.which("clang++")

HARNESS = """
#include <cstdio>
#define __device__
{unit}
int main()
{{
    Moments p, q;
    while (std::scanf("%lld %la %la %lld %la %la", &p.count, &p.mean, &p.m2, &q.count, &q.mean, &q.m2) == 6) {{
        const Moments both = unite(p, q);
        std::printf("%lld %a %a %a\\n", both.count, both.mean, both.m2, relu(both.mean));
    }}
}}
"""


def test_no_include_of_our_own_is_left_and_each_header_is_pasted_once():
    text = translation_unit("moments.cuh")
    assert not re.search(r'#\s*include\s+"', text)
    assert not re.search(r"#\s*pragma\s+once", text)
    assert text.count("typedef long long index_t") == 1


def test_line_marks_name_the_line_in_the_editor():
    """Walk the text as a compiler does and look each line up in the file that the marks name."""
    file, number, seen = "", 0, 0
    for line in translation_unit("moments.cuh").splitlines():
        mark = re.fullmatch(r'#line (\d+) "(.+)"', line)
        if mark:
            number, file = int(mark[1]) - 1, mark[2]
            continue
        number += 1
        original = (kernel_folder() / file).read_text().splitlines()[number - 1]
        assert line in (original, ""), f"{file}:{number}"
        seen += line == original
    assert seen > 40


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
def test_the_kernels_merge_is_the_union_of_python_bit_for_bit(tmp_path):
    """unite() compiled for the host in double, without fused multiply-adds, against Moments.__or__."""
    source, program = tmp_path / "unite.cpp", tmp_path / "unite"
    source.write_text(HARNESS.format(unit=translation_unit("moments.cuh")))
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-DX_TYPE=3", "-Wall", "-Werror", source, "-o", program],
        check=True,
    )
    rng = np.random.default_rng(40)
    pairs = [(0, 0.0, 0.0, 0, 0.0, 0.0), (0, 0.0, 0.0, 3, -1.5, 1e300), (2, 1e200, 3.0, 0, 0.0, 0.0)]
    for _ in range(200):
        p, q = rng.integers(1, 10**9, 2)
        pairs.append((p, rng.normal() * 1e6, rng.random(), q, rng.normal(), rng.random() * 1e9))
    lines = "\n".join(f"{p} {m.hex()} {s.hex()} {q} {n.hex()} {t.hex()}" for p, m, s, q, n, t in map(as_python, pairs))
    done = subprocess.run([program], input=lines, text=True, capture_output=True, check=True)
    for (p, m, s, q, n, t), line in zip(pairs, done.stdout.splitlines(), strict=True):
        both = Moments(int(p), np.float64(m), np.float64(s)) | Moments(int(q), np.float64(n), np.float64(t))
        count, mean, m2, rectified = line.split()
        assert int(count) == both.count
        assert float.fromhex(mean) == both.mean
        assert float.fromhex(m2) == both.m2
        assert float.fromhex(rectified) == max(both.mean, 0)


def as_python(pair):
    p, m, s, q, n, t = pair
    return int(p), float(m), float(s), int(q), float(n), float(t)
