"""The CUDA forms of the decision and of the reduced MLPs: Triton kernels that read levels on the device and never ask the host.

Imported only where the model lies on a GPU (`DeviceForms` is made by the `State` there), so the CPU needs no Triton.
"""
