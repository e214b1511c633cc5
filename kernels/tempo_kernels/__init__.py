"""tempo_kernels: the loss head, the objectives and the pixel layout. Needs torch alone; importing it touches no device.

    from tempo_kernels.head import linear_logp, head_statistics
    from tempo_kernels.objectives import BranchBatch, make_objective
    from tempo_kernels.patchify import patchify
"""
