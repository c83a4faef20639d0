"""Disassemble a compiled kernel: instructions, basic blocks, loops, and where in the source each comes from.

nvdisasm, which ships in Triton's wheel, names the line of PTX behind every machine instruction; Triton's PTX names the
source line and the calls it was inlined through.
"""

from __future__ import annotations

import graphlib
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import triton

from vllm_specopt.benchmarks.kernels.compiling import Compiled

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
# What issues each instruction. The first pattern that matches the whole name before the first dot counts.
PIPES = {
    "mufu": r"MUFU",
    "fp32": r"FADD|FMUL|FFMA|FSWZADD|FADD2|FMUL2|FFMA2|FADD32I|FMUL32I|FFMA32I",
    "fp64": r"DADD|DMUL|DFMA|DSETP|DMNMX",
    "compare": r"FSETP|FSEL|FMNMX|FMNMX3|FSET|FCHK",
    "half": r"HADD2|HMUL2|HFMA2|HSETP2|HSET2|HMNMX2|VHMNMX|HADD2_32|HFMA2_MMA",
    "imad": r"IMAD|IDP|IDP4A|IMUL",
    "convert": r"I2F|F2I|F2F|F2FP|POPC|FLO|BREV|FRND|I2I|I2IP",
    "load": r"LDG|LD|LDGSTS|LDGDEPBAR",
    "store": r"STG|ST|RED|REDG|ATOM|ATOMG",
    "shared": r"LDS|STS|ATOMS|LDSM|STSM",
    "local": r"LDL|STL",
    "constant": r"LDC|LDCU|ULDC",
    "shuffle": r"SHFL|VOTE|MATCH|REDUX|CREDUX",
    "barrier": r"ENDCOLLECTIVE|BAR|DEPBAR|MEMBAR|ERRBAR|WARPSYNC|FENCE|CCTL|SYNCS|ACQBULK|B2R|CGAERRBAR",
    "control": r"BRA|BRX|EXIT|RET|CALL|BSSY|BSYNC|BREAK|NOP|JMP|BPT|NANOSLEEP|YIELD|BMOV|WARPSYNC|PREEXIT",
    "uniform": r"U[A-Z0-9]+|R2UR|VOTEU|S2UR",
    "integer": r"LOP3|PLOP3|LOP|SHF|SHL|SHR|ISETP|IMNMX|VIMNMX|VIMNMX3|IADD3|IADD|SEL|LEA|PRMT|IABS|SGXT|BMSK|ICMP|"
    r"VIADD|VIADDMNMX|MOV|CS2R|MOV32I|VABSDIFF|I2FP|S2R|P2R|R2P|R2B|LEPC|ELECT|IADD2|MOVM|GETLMEMBASE",
}
_PIPES = {name: re.compile(f"(?:{pattern})$") for name, pattern in PIPES.items()}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+|\.text\.[\w.$]+|\$__internal[\w$]+):")
_PTX_LINE = re.compile(r'//## File "\.nv_debug_ptx_txt", line (\d+)')
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:, function_name [^,]*, inlined_at (\d+) (\d+) (\d+))?")
_TARGET = re.compile(r"`\(([.$\w]+)\)")
_ENDS = re.compile(r"(BRA|EXIT|BRX|RET|CALL|BSYNC|JMP|BREAK|WARPSYNC|BPT)\b")


@cache
def pipe(name: str) -> str:
    """Pipe of an instruction; raises ValueError for a name that the table lacks."""
    short = name.split(".")[0]
    for found, pattern in _PIPES.items():
        if pattern.match(short):
            return found
    raise ValueError(f"the table of pipes lacks the instruction {name!r}")


@dataclass(frozen=True)
class Frame:
    """A place in the source."""

    file: str
    line: int


@dataclass
class Instruction:
    """One machine instruction; ``frames`` lead from the kernel to the innermost inlined function."""

    address: int
    predicate: str
    name: str
    arguments: str
    ptx_line: int
    frames: tuple[Frame, ...]


@dataclass(eq=False)
class Block:
    """Instructions that run one after the other.

    successors, predecessors: Numbers of other blocks. slow: the rare way of the compiler's own that alone leads here.
    """

    number: int
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)
    predecessors: list[int] = field(default_factory=list)
    reachable: bool = False
    slow: str = ""

    @property
    def runs(self) -> bool:
        """Whether a usual run can reach it."""
        return self.reachable and not self.slow

    @property
    def leaves(self) -> bool:
        """Whether threads may end here."""
        return self.instructions[-1].name == "EXIT"


@dataclass
class Loop:
    """A natural loop: its header and all blocks in it."""

    header: int
    blocks: set[int]


class MachineCode:
    """A kernel's instructions as a graph of basic blocks."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        instructions, labels = _parse(_disassemble(compiled), _ptx_frames(compiled.ptx))
        self.blocks = _blocks(instructions, labels)
        self._mark_reachable()
        self.dominators = self._dominators()
        self.loops = self._loops()

    def _mark_reachable(self) -> None:
        """From the entry; what is reached only through a rare way of the compiler's own is marked as slow."""
        for slow in ("", "a slow division or a diverged warp"):
            pending = [0] if not slow else [b.number for b in self.blocks if b.slow]
            while pending:
                block = self.blocks[pending.pop()]
                if block.reachable:
                    continue
                block.reachable = True
                block.slow = block.slow or slow
                pending += [n for n in block.successors if slow or not self.blocks[n].slow]

    def _dominators(self) -> dict[int, set[int]]:
        """Of blocks that run. A rare way joins them again, but no edge that leads into it is known."""
        everything = {block.number for block in self.blocks if block.runs}
        found = {number: set(everything) for number in everything}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for number in sorted(everything - {0}):
                before = [found[n] for n in self.blocks[number].predecessors if n in everything]
                now = set.intersection(*before) | {number}
                if now != found[number]:
                    found[number], changed = now, True
        return found

    def _loops(self) -> list[Loop]:
        """Natural loops, the largest first.

        Raises:
            ValueError: blocks that follow each other in a circle are no natural loop.
        """
        bodies: dict[int, set[int]] = {}
        forward: dict[int, list[int]] = {}
        for number, dominators in self.dominators.items():
            successors = self.blocks[number].successors
            forward[number] = [n for n in successors if n not in dominators]
            for header in dominators.intersection(successors):
                body, pending = {header}, [number]
                while pending:
                    inside = pending.pop()
                    if inside not in body:
                        body.add(inside)
                        pending += [n for n in self.blocks[inside].predecessors if self.blocks[n].runs]
                bodies.setdefault(header, set()).update(body)
        try:
            graphlib.TopologicalSorter(forward).prepare()
        except graphlib.CycleError as error:
            raise ValueError(f"{self.compiled.name}: a circle of blocks without a header, {error.args[1]}") from None
        return sorted((Loop(header, body) for header, body in bodies.items()), key=lambda loop: -len(loop.blocks))

    def loops_around(self, number: int) -> list[Loop]:
        """Loops that hold a block, outermost first."""
        return [loop for loop in self.loops if number in loop.blocks]


def _disassemble(compiled: Compiled) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        command = [str(NVDISASM), "-c", "-gp", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ptx_frames(ptx: str) -> list[tuple[Frame, ...]]:
    """Frames of every line of PTX, counted from 1.

    Triton 3.6 writes the calls into a comment, later ones into the directive, which names the call as a place that an
    earlier directive gave frames to.
    """
    files = {number: name for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.MULTILINE)}
    by_name = {Path(name).name: name for name in files.values()}
    calls: dict[tuple[str, str, str], tuple[Frame, ...]] = {}
    frames: list[tuple[Frame, ...]] = [()]
    current: tuple[Frame, ...] = ()
    in_assembly = False
    for line in ptx.splitlines():
        # Inside inline assembly the line number counts the lines of the assembly.
        if "inline asm" in line:
            in_assembly = "begin inline asm" in line
        found = None if in_assembly else _LOC.match(line)
        if found and found[2] == "0":
            current = ()
        elif found:
            place = Frame(files[found[1]], int(found[2]))
            comment = line.partition("//")[2]
            if found[4]:
                outer = calls.get((found[4], found[5], found[6])) or (Frame(files[found[4]], int(found[5])),)
                current = (*outer, place)
            elif "@[" in comment:
                places = re.findall(r"([^\s\[]+?):(\d+):\d+", comment)
                current = tuple(Frame(by_name.get(name, name), int(number)) for name, number in reversed(places))
            else:
                current = (place,)
            calls[found[1], found[2], found[3]] = current
        frames.append(current)
    return frames


def _parse(text: str, frames: list[tuple[Frame, ...]]) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    ptx_line = 0
    for line in text.splitlines():
        if found := _PTX_LINE.search(line):
            ptx_line = int(found[1])
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            words = _find(r"^(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*)", found[2])
            where = frames[ptx_line] if ptx_line < len(frames) else ()
            instructions.append(Instruction(int(found[1], 16), words[1] or "", words[2], words[3], ptx_line, where))
    if not instructions:
        raise ValueError("nvdisasm printed no instructions")
    return instructions, labels


def _find(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
    """What a pattern matches, which must be there."""
    if (found := re.search(pattern, text)) is None:
        raise ValueError(f"nvdisasm printed {text!r}, which this tool does not read")
    return found


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> list[Block]:
    leaders = {0} | {place for place in labels.values() if place < len(instructions)}
    leaders |= {n + 1 for n, i in enumerate(instructions[:-1]) if _ENDS.match(i.name)}
    starts = sorted(leaders)
    number_of = {start: number for number, start in enumerate(starts)}
    blocks = [
        Block(number, instructions[start:end])
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(instructions)], strict=True))
    ]
    sync_targets: dict[str, str] = {}
    for block in blocks:
        for instruction in block.instructions:
            if instruction.name.startswith("BSSY"):
                register = _find(r"B\d+", instruction.arguments)[0]
                sync_targets[register] = _find(_TARGET, instruction.arguments)[1]
        last = block.instructions[-1]
        target = _TARGET.search(last.arguments)
        following = [block.number + 1] if block.number + 1 < len(blocks) else []
        conditional = bool(last.predicate) or bool(re.match(r"!?U?P\d", last.arguments))
        name = last.name.split(".")[0]
        if name in ("BRA", "JMP"):
            rare = "DIV" in last.name
            goal = number_of[labels[_find(_TARGET, last.arguments)[1]]]
            if rare:
                blocks[goal].slow = "a diverged warp"
            block.successors = ([] if rare else [goal]) + (following if conditional or rare else [])
        elif name == "EXIT":
            block.successors = following if last.predicate else []
        elif name == "BSYNC":
            label = sync_targets.get(_find(r"B\d+", last.arguments)[0])
            block.successors = [number_of[labels[label]]] if label in labels else following
        elif name == "CALL":
            if target and target[1].startswith(".L_x"):
                # No subroutine but a jump.
                following = [number_of[labels[target[1]]], *(following if conditional else [])]
            elif target and target[1] in labels:
                # Of ptxas's subroutines the kernels use divisions, roots, and what a diverged warp does one by one.
                blocks[number_of[labels[target[1]]]].slow = "a subroutine for unusual operands or a diverged warp"
                if not re.search(r"_full|slowpath|(shfl|redux|warp)sync", target[1]):
                    raise ValueError(f"a call of {target[1]}, which this tool cannot weigh")
            block.successors = following
        elif name in ("RET", "BRX", "BPT"):
            block.successors = []
        else:
            block.successors = following
        block.successors = sorted({n for n in block.successors if n != block.number or name == "BRA"})
    for block in blocks:
        for number in block.successors:
            blocks[number].predecessors.append(block.number)
    return blocks
