"""Machine code as tools/machine_code.py reads it: loops, pipes, stores, the predicted share of the matrix rate."""

from collections import Counter

import pytest
from support.paths import ROOT
from support.programs import load_program

pytest.importorskip("networkx", reason="comes with torch")
machine_code = load_program(ROOT / "tools" / "machine_code.py")

# A loop over tiles around one over steps; one of two sides of a branch, and a part that runs once per program.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   FADD R4, R2, R3 ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24 ;
        /*0050*/              @!P0 BRA 0x20 ;
        /*0060*/               @P1 BRA 0x90 ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/                   FFMA R5, R5, R6, R7 ;
        /*0090*/                   SHFL.BFLY PT, R6, R5, 0x1, 0x1f ;
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*00b0*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*00c0*/              @!P2 BRA 0x10 ;
        /*00d0*/                   STG.E desc[UR4][R2.64], R8 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0 ;
"""
STEP_FLOP = 2 * 2 * 64 * 128 * 16 // 4

# The first step is peeled off the loop; loop and tile begin at one place.
GCN = """
.LBB0_0:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], 0
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
	ds_read_b64 v[16:17], v20
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
	s_cbranch_scc1 .LBB0_2
	v_exp_f32_e32 v0, v0
	v_pk_mul_f32 v[0:1], v[0:1], v[2:3]
	v_cndmask_b32_e32 v0, v1, v2, vcc
	global_store_dwordx4 v[20:21], v[0:3], off
	buffer_store_short v0, v1, s[0:3], 0 offen
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def counted(**pipes: int) -> Counter[str]:
    return Counter(pipes)


@pytest.mark.parametrize("steps", [2, 7])
def test_steps_and_tiles_of_nvidia(steps):
    code = machine_code.nvidia(SASS)
    in_steps, rest = code.per_tile(STEP_FLOP, steps)
    assert in_steps == counted(**{"global": steps, "matrix": 2 * steps, "other": steps})
    assert rest == counted(fma=2, special=1, shared=1, other=2, **{"global": 2})
    assert code.widest_store() == 8


def test_steps_and_tiles_of_amd():
    code = machine_code.amd(GCN)
    in_steps, rest = code.per_tile(2 * 32 * 32 * 8, 5)
    assert in_steps == counted(shared=4, matrix=4, other=4)
    assert rest == counted(matrix=1, special=1, fma=1, alu=1, other=1, **{"global": 2})
    assert code.widest_store() == 16


def test_unrolled_steps_are_part_of_the_tile():
    """The loop over tiles is then the innermost one that multiplies: what is in it counts once."""
    in_steps, rest = machine_code.nvidia(SASS.replace("BRA 0x20", "NOP")).per_tile(STEP_FLOP // 4, 4)
    assert not in_steps
    assert rest == counted(matrix=2, fma=2, special=1, shared=1, other=3, **{"global": 3})


def test_turns_of_an_unrolled_loop_take_several_steps():
    in_steps, _ = machine_code.nvidia(SASS).per_tile(STEP_FLOP // 2, 6)
    assert in_steps["matrix"] == 2 * 3


def test_products_that_warps_share_are_one_step():
    """A step of 5/3 of a warp's own FLOP, as where two warps form a third of them twice."""
    in_steps, _ = machine_code.nvidia(SASS).per_tile(STEP_FLOP * 3 // 5, 6)
    assert in_steps["matrix"] == 2 * 6


def test_an_exit_in_the_middle_of_a_loop_counts_the_last_turn_in_full():
    in_steps, _ = machine_code.nvidia(SASS).per_tile(STEP_FLOP // 2, 5)
    assert in_steps["matrix"] == 2 * 3


def test_rejects_more_products_than_the_steps_have():
    with pytest.raises(ValueError, match="expected 1 steps of 8192 FLOP, got turns of 16384 beside 16384"):
        machine_code.amd(GCN).per_tile(32 * 32 * 8, 1)


def test_a_tile_whose_only_step_comes_before_the_loop():
    """The compiler forms the next tile's products at the end of a turn, and the first tile's before all turns."""
    in_steps, rest = machine_code.nvidia(SASS.replace("FADD R4, R2, R3", "HGMMA.64x128x16.F32")).per_tile(STEP_FLOP, 1)
    assert not in_steps and rest == counted(**{"global": 1, "matrix": 2, "other": 1})


def test_the_shorter_side_of_a_branch():
    code = machine_code.nvidia(SASS)
    both, shorter = code.per_tile(STEP_FLOP, 5), code.per_tile(STEP_FLOP, 5, shortest=True)
    assert shorter[0] == both[0] and both[1] - shorter[1] == counted(special=1, fma=1)


def test_tensor_cores_of_blackwell():
    """Their instructions do not name their size."""
    code = machine_code.nvidia(SASS.replace("HGMMA.64x128x16.F32.BF16", "UTCHMMA"), tensor_flop=STEP_FLOP // 2)
    assert code.per_tile(STEP_FLOP, 3)[0]["matrix"] == 2 * 3


def test_a_loop_whose_end_comes_first():
    """Its way back is no jump: the instructions that end a turn fall through to those that begin one."""
    code = machine_code.amd(
        """
	s_branch .LBB0_2
.LBB0_1:
	v_exp_f32_e32 v0, v0
	s_cbranch_scc0 .LBB0_3
.LBB0_2:
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], 0
	s_branch .LBB0_1
.LBB0_3:
	s_endpgm
"""
    )
    assert code.per_tile(2 * 32 * 32 * 8, 1)[1] == counted(special=1, matrix=1, other=2)


@pytest.mark.parametrize(
    "opcode, pipe",
    [
        *(("LDC.64", "other"), ("LDS.128", "shared"), ("LDGSTS.E.128", "global"), ("UTMALDG.2D", "global")),
        *(("IMAD.MOV.U32", "fma"), ("HFMA2.BF16_V2", "fma"), ("FSETP.GT.AND", "alu"), ("LEA.HI", "alu")),
    ],
)
def test_pipes(opcode, pipe):
    assert machine_code.nvidia(SASS).pipe(opcode) == pipe


def test_share_is_that_of_what_binds():
    """Products at full rate, then what takes longer than they do in turn: L2, instructions of steps, of the rest."""
    machine = machine_code.Machine({2: 1000}, 10, {"special": 8})
    none, many = Counter(), counted(alu=500)

    def share(l2_bytes: int, in_steps: Counter[str], rest: Counter[str]) -> float:
        return machine.matrix_share(2, 500_000, l2_bytes, 4, in_steps, rest)  # 500 clocks of products

    assert share(0, none, none) == share(5000, many, none) == 1
    assert share(10_000, none, none) == share(0, counted(alu=1000), none) == 0.5
    assert share(0, none, many) == 0.5
    assert share(0, none, counted(special=125)) == pytest.approx(1 / 3)
