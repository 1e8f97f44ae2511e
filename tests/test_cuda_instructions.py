"""The machine code of the kernels, without a GPU: no loop takes more instructions than the memory leaves time for."""

import sys
from pathlib import Path

import pytest
from host.nvrtc import toolkits
from host.sass import disassembler, innermost, parse

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import instructions

from cubn.machines.cuda.plan import DEVICES, TENSORS

needs_code = pytest.mark.skipif(
    not toolkits() or not disassembler(), reason="needs NVRTC and nvdisasm; pip install nvidia-cuda-nvdisasm"
)

LISTING = """
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FADD R1, R4, R5 ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   FADD R1, R4, R6 ;
        /*0060*/                   FADD R1, R1, R7 ;
.L_x_3:
        /*0070*/               @P2 BRA `(.L_x_4) ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_4:
        /*0090*/                   ISETP.GE.AND P1, PT, R0, R3, PT ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""


def test_a_turn_makes_all_accesses_and_takes_every_other_short_cut():
    (loop,) = innermost(*parse(LISTING))
    assert (loop.loads, loop.stores, loop.kept, loop.copies) == (1, 1, 0, 0)
    assert (loop.instructions, loop.most) == (8, 10)


def test_the_inner_of_two_loops_is_counted():
    outer = LISTING.replace("EXIT ;", "BRA `(.L_x_0) ;").replace(
        ".L_x_1:", ".L_x_0:\n        /*0000*/ NOP ;\n.L_x_1:", 1
    )
    (loop,) = innermost(*parse(outer))
    assert loop.most == 10


@needs_code
@pytest.mark.parametrize("layout", instructions.SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kernel", instructions.MOVED)
def test_a_window_takes_less_than_half_of_the_instructions_that_its_bytes_leave_time_for(kernel, dtype, layout):
    """On an H200; of `moments`, which writes nothing, three quarters."""
    cost = instructions.cost_of(kernel, dtype, layout, DEVICES["h200"])
    if kernel in TENSORS:
        assert {"fetch", "sum", "give out"} <= set(cost.phases)
    assert cost.instructions[1] < cost.budget * (0.75 if kernel == "moments" else 0.5)
