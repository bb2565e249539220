"""The CUDA forms of the decision and of the reduced MLPs: Triton kernels that read levels on the device and never ask the host.

Imported only where the model lies on a GPU (choice.py decides), so the CPU needs no Triton.
"""
