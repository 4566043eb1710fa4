"""Inline PTX that decodes 8 neighbouring columns of a bitmask row.

A lane holds the 8 bits of its columns and the address of its first stored value. For
each half of the bits it loads the next four stored values, whether they are its own or
not. In the order of the columns, value 0 of the four belongs to a column whose bit is
set, and selects then move the other three down by one. No address is computed for a
single weight, and no load waits for another. ptxas makes a third fewer instructions of
this than of the same algorithm in Triton.

Up to `OVERREAD` values past the last of a matrix are loaded and not used.
"""

# Four values are loaded from a place at most four past the last stored one.
OVERREAD = 8
# Kind of a value -> PTX that loads value i of four, from address `a`.
_LOAD = {
    "bf16": "ld.global.nc.b16 h{i}, [a+{o2}]; ",
    "fp16": "ld.global.nc.b16 h{i}, [a+{o2}]; ",
    "fp32": "ld.global.nc.f32 f{i}, [a+{o4}]; ",
}
# Likewise -> PTX that converts it to float32. bfloat16 is the upper half of a float32.
_WIDEN = {
    "bf16": "mov.b32 f{i}, {{z, h{i}}}; ",
    "fp16": "cvt.f32.f16 f{i}, h{i}; ",
    "fp32": "",
}
_REGISTERS = (
    "{ .reg .pred p0, p1, p2, p3; .reg .b32 t, b, n; .reg .b16 h0, h1, h2, h3, z; "
    ".reg .b64 a; .reg .f32 f0, f1, f2, f3, s; mov.b16 z, 0; "
)


def _decode(kind: str, bits: int, widens: bool, use: str) -> str:
    """Return PTX that gives each of 8 columns to `use`.

    Args:
        kind: Of the values: bf16, fp16 or fp32.
        bits: Number of the operand with the bits; the address is the next operand.
        widens: Whether values are converted to float32.
        use: PTX for column {j}: its bit is predicate p{i}, its value {v}0, and the j-th
            operand after the address ${x}.
    """
    size = 4 if kind == "fp32" else 2
    v, dtype = ("f", "b32") if widens or kind == "fp32" else ("h", "b16")
    code = f"mov.b32 b, ${bits}; mov.b64 a, ${bits + 1}; "
    for half in (0, 1):
        for i in range(4):
            code += f"and.b32 t, b, {1 << 4 * half + i}; setp.ne.b32 p{i}, t, 0; "
        for template in (_LOAD[kind], _WIDEN[kind] if widens else ""):
            code += "".join(template.format(i=i, o2=2 * i, o4=4 * i) for i in range(4))
        for i in range(4):
            code += use.format(i=i, j=4 * half + i, x=bits + 2 + 4 * half + i, v=v)
            for k in range(3 - i):
                code += f"selp.{dtype} {v}{k}, {v}{k + 1}, {v}{k}, p{i}; "
        if half == 0:
            code += f"and.b32 n, b, 15; popc.b32 n, n; mad.wide.u32 a, n, {size}, a; "
    return code


def multiply_add(kind: str) -> str:
    """Return PTX for `$0 = $1 + sum of weights * inputs` in float32.

    Operands: $2 bits, of which the lowest 8 count; $3 address; $4 to $11 inputs.
    """
    use = "@p{i} fma.rn.f32 s, {v}0, ${x}, s; "
    body = "mov.f32 s, $1; " + _decode(kind, 2, True, use) + "mov.f32 $0, s; "
    return _REGISTERS + body + "}"


def expand(kind: str) -> str:
    """Return PTX for the 8 weights $0 to $7, zeros included, as bits.

    Operands: $8 bits, of which the lowest 8 count; $9 address.
    """
    zero, dtype = ("0", "b32") if kind == "fp32" else ("z", "b16")
    use = "selp." + dtype + " ${j}, {v}0, " + zero + ", p{i}; "
    return _REGISTERS + _decode(kind, 8, False, use) + "}"


# Constraints of the operands, as LLVM writes them.
MULTIPLY_ADD_OPERANDS = "=f,f,r,l" + ",f" * 8


def expand_operands(kind: str) -> str:
    """Return the constraints of the operands of `expand`."""
    return ",".join(["=r" if kind == "fp32" else "=h"] * 8) + ",r,l"
