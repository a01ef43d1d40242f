"""The kernel that a rep layer gives to read: it computes like any tensor, and refuses to be written to."""
import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
from helpers import assert_near, randn
from torch import Tensor
from torch.nn.utils import fuse_conv_bn_eval, prune

from timm_rep import OrepaConv2d, UserError
from timm_rep.core.layers import DiverseBranchConv2d, FoldedNorm

WRITES = {
    'in place': lambda layer: layer.weight.mul_(0),
    'init': lambda layer: nn.init.zeros_(layer.weight),
    'init through data': lambda layer: nn.init.trunc_normal_(layer.weight.data),
    'data': lambda layer: layer.weight.data.fill_(1),
    'new data': lambda layer: setattr(layer.weight, 'data', torch.zeros(4, 4, 3, 3)),
    'item': lambda layer: layer.weight.__setitem__((0, 0), 1),
    'operator': lambda layer: layer.weight.__iadd__(1),
    'view': lambda layer: layer.weight.detach().flatten(1)[0].zero_(),
    'split view': lambda layer: layer.weight.split(2)[1].zero_(),
    'out': lambda layer: torch.add(layer.weight, 1, out=layer.weight.detach()),
    'functional': lambda layer: torch.nn.functional.relu(layer.weight, inplace=True),
    'module': lambda layer: nn.LeakyReLU(inplace=True)(layer.weight),
    'keyword': lambda layer: torch.reshape(input=layer.weight, shape=(-1,)).zero_(),
    'foreach': lambda layer: torch._foreach_mul_([layer.weight.detach()], 2.0),
    'parameter': lambda layer: setattr(layer, 'weight', nn.Parameter(torch.zeros(4, 4, 3, 3))),
    'tensor': lambda layer: setattr(layer, 'weight', torch.zeros(4, 4, 3, 3)),
    'pruning': lambda layer: prune.l1_unstructured(layer, 'weight', 0.3),
    'fuse_conv_bn_eval': lambda layer: fuse_conv_bn_eval(layer.eval(), nn.BatchNorm2d(4).eval()),
}


@pytest.mark.parametrize('write', WRITES)
@pytest.mark.parametrize('layer_cls', [OrepaConv2d, DiverseBranchConv2d])
def test_writes_are_refused(layer_cls, write):
    layer = layer_cls(4, 4, 3)
    before = layer.compose_weight()
    with pytest.raises(UserError, match=r'restore_\(kernel\)'):
        WRITES[write](layer)
    assert torch.equal(layer.compose_weight(), before)


def test_what_comes_of_a_kernel_is_a_plain_tensor_to_write_to():
    layer = OrepaConv2d(4, 4, 3, dtype=torch.float64)
    kernel = layer.weight
    results = [kernel * 2, kernel.clone(), kernel.to(torch.float32), torch.cat([kernel, kernel]), kernel.sum(0)]
    results += [copy.deepcopy(kernel.detach()), kernel.detach().reshape(-1).clone()]
    for result in results:
        assert type(result) is Tensor
        result.detach().zero_()
    assert kernel.abs().max() > 0
    x = randn(2, 4, 5, 5)
    assert_near(torch.nn.functional.conv2d(x, kernel, layer.bias), layer(x), 1e-12)
    kernel.sum().backward()
    assert layer.branches.grad is not None


def test_a_kernel_can_start_a_parameter_and_be_saved():
    layer = OrepaConv2d(4, 4, 3)
    parameter = nn.Parameter(layer.weight.detach())
    parameter.sum().backward()
    torch.optim.SGD([parameter], 1.0).step()
    assert_near(parameter.detach(), layer.compose_weight().detach() - 1, 1e-6)
    file = io.BytesIO()
    torch.save(layer.weight.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), layer.compose_weight())


def test_a_parameter_of_a_kernel_is_as_any():
    conv = nn.Conv2d(4, 4, 3)
    conv.weight = nn.Parameter(OrepaConv2d(4, 4, 3).weight.detach())
    conv.weight.data.clamp_(-0.1, 0.1)
    with torch.no_grad():
        conv.weight[0].zero_()
    for copied in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert type(copied.weight) is nn.Parameter
        assert torch.equal(copied.weight, conv.weight)


def test_kernels_in_other_layouts_and_derivatives():
    kernel = OrepaConv2d(4, 4, 3).weight
    assert torch.equal(kernel.detach().to_sparse().to_dense(), kernel)
    tangent = torch.ones(4, 4, 3, 3)
    assert torch.equal(torch.func.jvp(torch.flatten, (kernel.detach(),), (tangent,))[1], tangent.flatten())
    kernel.grad = None
    flat = torch.compile(lambda read: read.flatten() * 2, backend='eager')(kernel.detach())
    assert torch.equal(flat, 2 * kernel.flatten())


def test_a_compiled_reader_sees_the_kernel():
    layer = OrepaConv2d(4, 4, 3)
    read = torch.compile(lambda: layer.weight * 2, backend='eager', fullgraph=True)
    assert torch.equal(read(), layer.compose_weight() * 2)


def test_a_folded_norm_says_where_the_norm_is():
    folded = FoldedNorm(nn.BatchNorm2d(4))
    with pytest.raises(AttributeError, match=r"no 'running_mean'.*timm_rep\.fuse\(model\) first"):
        _ = folded.running_mean
    assert not hasattr(folded, 'weight')
    with pytest.raises(AttributeError, match=r'timm_rep\.fuse\(model\) first'):
        fuse_conv_bn_eval(DiverseBranchConv2d(4, 4, 3).eval(), folded.eval())
