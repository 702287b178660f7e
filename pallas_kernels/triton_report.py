"""What the compilers make of the Triton kernels, told without a GPU. Level 0.

`python -m pallas_kernels.triton_report` compiles each kernel with the tiles that `triton_op` uses,
for heads of 64 and bfloat16 tokens, and prints registers, stack, shared memory and instructions.
"""
