"""Checkpoints that the authors of OREPA, DBB, RepVGG and RepAn published, into our models: one file per layout.

The authors' blocks own the norm behind the convolution, so a block of theirs is a pair here, convolution and norm:

=====================  ==================================================  ==================================
block                  tensors, by the start of their names                here
=====================  ==================================================  ==================================
OREPA                  ``weight_orepa_``, in RepVGG ``weight_rbr_``        ``OrepaConv2d`` and norm
OREPA stem             ``weight0.weight_orepa_``, ``weight1. ...``         ``OrepaStemConv2d`` and norm
Rep-1x1                ``weight_or1x1_``                                   ``OrepaPointwiseConv2d`` and norm
DBB                    ``dbb_origin``, ``dbb_avg``, ``dbb_1x1_kxk`` ...    ``DiverseBranchConv2d``
ACB                    ``square_``, ``hor_``, ``ver_``                     ``AsymmetricConv2d``
REP of RepAn           ``dbb_origin``, ``dbb_1x1``                         ``RepConv2d``, its identity adds nothing
plain                  ``conv``, ``bn``                                    convolution and norm; else restored
RepVGG                 ``rbr_dense``, ``rbr_1x1``, ``rbr_identity``        timm's ``RepVggBlock``
RepVGG of RepAn        ``conv_3``, ``bn_3``, ``conv_1``, ``bn_1`` ...      timm's ``RepVggBlock``
folded, any            ``*_reparam``, ``rep_conv``, ``conv`` with bias     stock form
=====================  ==================================================  ==================================

Sources of the layouts: the repositories that NOTICE names, at commits 3ed037b (OREPA_CVPR2022), 8d2b16b
(DiverseBranchBlock), eae7c52 (RepVGG), 7cb05e9 (RepAn).
"""
