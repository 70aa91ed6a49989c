"""Chunks, recomputation and compilation change no result, only memory and time."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from bundle.errors import InputError
from bundle.model.encoder import NORMS, with_norm
from bundle.model.encoding import SliceEncoding
from bundle.model.stages import stages_of
from tests.model.encoders import resnet

SIZE = 64


def made(norm: str, dropout: float = 0.0) -> nn.Module:
    encoder = with_norm(resnet(), norm, num_groups=4).double()
    if dropout:
        encoder.layer2.append(nn.Dropout(dropout))
    return encoder


def slices(count: int) -> torch.Tensor:
    return torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Counted(nn.Module):
    """Notes how many slices come at a time."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.counts: list[int] = []

    def forward(self, x):
        self.counts.append(len(x))
        return self.encoder(x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1, 4, 16, None, 0])
def test_chunks_give_what_all_at_once_gives(norm, size):
    encoder = Counted(made(norm)).eval()
    image = slices(18)
    with torch.no_grad():
        expected = encoder(image)
        encoder.counts.clear()
        given = SliceEncoding(size)(encoder, image)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)
    most = {None: 16, 0: 18}.get(size, size)
    assert max(encoder.counts) == most
    assert sum(encoder.counts) == 18


def test_a_batch_norm_in_training_sees_all_slices_even_without_gradients():
    encoder = Counted(made("batch")).train()
    with torch.no_grad():
        SliceEncoding(4)(encoder, slices(10))
    assert encoder.counts == [10]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputation_changes_neither_gradients_nor_statistics(norm, dropout):
    plain, recomputed = made(norm, dropout).train(), made(norm, dropout).train()
    image, seen = slices(7), []
    for encoder, encoding in ((plain, SliceEncoding(0)), (recomputed, SliceEncoding(3, recompute=True))):
        torch.manual_seed(5)
        # With dropout the draws of chunks differ from those of all slices: then all are one chunk.
        encoding.chunk_slices = 0 if dropout else encoding.chunk_slices
        features = encoding(encoder, image)
        features.square().sum().backward()
        seen.append((features.detach(), [p.grad for p in encoder.parameters()], encoder.state_dict()))
    (f1, g1, s1), (f2, g2, s2) = seen
    torch.testing.assert_close(f2, f1, rtol=0, atol=1e-12)
    assert all(g is not None for g in g2)
    torch.testing.assert_close(g2, g1, rtol=1e-9, atol=1e-10)
    assert s1.keys() == s2.keys()
    for name in s1:  # running means and the number of batches seen, once
        torch.testing.assert_close(s2[name], s1[name], rtol=1e-9, atol=1e-12, msg=name)


def kept_numbers(encoder: nn.Module, encoding: SliceEncoding, image: torch.Tensor) -> int:
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoding(encoder, image)
    own = {p.data_ptr() for p in encoder.parameters()}
    return sum(count for pointer, count in kept.items() if pointer not in own)


def test_recomputation_keeps_less():
    image = slices(12)
    plain = kept_numbers(made("group").train(), SliceEncoding(), image)
    # What is left with group norm are the slices themselves.
    assert kept_numbers(made("group").train(), SliceEncoding(4, recompute=True), image) == image.numel()
    assert image.numel() < 0.15 * plain
    assert kept_numbers(made("batch").train(), SliceEncoding(4, recompute=True), image) < 0.5 * plain


def test_recomputation_with_batch_norm_needs_known_stages():
    encoding = SliceEncoding(recompute=True)
    for refused in (encoding, lambda encoder, _: encoding.check(encoder)):
        with pytest.raises(InputError, match="the stages of a Counted are not known"):
            refused(Counted(made("batch")).train(), slices(3))
    encoding.check(Counted(made("group")))
    SliceEncoding().check(Counted(made("batch")))
    encoding(Counted(made("group")).train(), slices(3)).sum().backward()


def test_recomputation_with_batch_norm_is_not_compiled_in_silence():
    encoding = SliceEncoding(recompute=True, compile=True)
    with pytest.raises(InputError, match="compile_encoder and activation_checkpointing do not go together"):
        encoding.check(made("batch"))
    encoding.check(made("group"))
    encoding.check(made("frozen_batch"))


def test_a_later_first_stage_takes_what_the_stages_before_give():
    encoder, image = made("group").eval(), slices(5)
    through = nn.Sequential(*stages_of(encoder)[:3])(image)
    torch.testing.assert_close(SliceEncoding(2, first_stage=3)(encoder, through), encoder(image))
    everything = nn.Sequential(*stages_of(encoder))(image)
    assert torch.equal(SliceEncoding(2, first_stage=5)(encoder, everything), everything)


def test_one_small_slice_alone_is_too_few_for_batch_norm():
    encoder = made("batch").train()
    with pytest.raises(InputError, match="cannot train on a batch of one slice, of which one pixel is left"):
        SliceEncoding()(encoder, slices(1)[..., :16, :16])
    assert SliceEncoding()(encoder, slices(2)[..., :16, :16]).shape[0] == 2
    assert SliceEncoding()(made("group").train(), slices(1)[..., :16, :16]).shape[0] == 1
    assert SliceEncoding()(encoder.eval(), slices(1)[..., :16, :16]).shape[0] == 1


def test_a_bad_chunk_is_refused():
    with pytest.raises(InputError, match="chunk_slices must be 0"):
        SliceEncoding(-1)


def test_copies_and_pickles_carry_the_settings_alone():
    encoding = SliceEncoding(3, recompute=True, compile=True, first_stage=2)
    encoding._compiled[1] = lambda x: x
    for other in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert (other.chunk_slices, other.recompute, other.compile, other.first_stage) == (3, True, True, 2)
        assert other._compiled == {}


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="PyTorch does not compile where its own path has a space")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_encoder_gives_the_same():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image = torch.rand(11, 1, 16, 16)
    encoding = SliceEncoding(4, compile=True)
    for mode in (False, True):
        encoder.train(mode)
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(encoding(encoder, image), encoder(image), rtol=1e-5, atol=1e-6)
    first = encoding(encoder, image).sum()
    first.backward()
    assert encoder[0].weight.grad is not None


@pytest.mark.parametrize(("folder", "error"), [("/a b/torch", InputError), ("/ab/torch", BackendCompilerFailed)])
def test_where_the_path_of_pytorch_has_a_space_it_says_so(folder, error, monkeypatch):
    def fails(slices):
        raise BackendCompilerFailed(lambda: None, RuntimeError("CppCompileError: cannot find b/torch/lib"), None)

    monkeypatch.setattr(torch, "compile", lambda module: fails)
    monkeypatch.setattr(torch, "__file__", f"{folder}/__init__.py")
    with pytest.raises(error, match="has a space" if error is InputError else "CppCompileError"), torch.no_grad():
        SliceEncoding(compile=True)(nn.Flatten().eval(), torch.rand(3, 1, 9, 9))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": ("/nonexistent/g++",), "fx_graph_cache": False}):
        encoding = SliceEncoding(compile=True)
        with pytest.raises(InputError, match="compile_encoder needs a C\\+\\+ compiler"), torch.no_grad():
            encoding(nn.Sequential(nn.Conv2d(1, 3, 5), nn.ReLU(), nn.Flatten()).eval(), torch.rand(3, 1, 9, 9))
