"""How the tokens of a chunk get at what the layers know of earlier ones: by the attention interface, by hand, or by states in a cache.

Found by running a few tokens, not by names of models: what does not attend through transformers' interface, or has a convolution over
tokens, is followed through the cache that the body makes by itself.
"""

from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from hf_memtune.architectures import Architecture, tables
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.states import ARGUMENTS, CacheTemplate

_INDEXED = "indexed_attention"  # transformers' name of layers that choose by keys of their own what they attend to


def cache_template(architecture: Architecture, call: BodyCall, attended: set[int]) -> CacheTemplate | None:
    """The cache by which layers are followed; None where all of them attend through the interface, and do nothing else.

    attended: ids of the modules that called the interface. Raises UnsupportedModelError for a layer that cannot be followed.
    """
    silent = _silent_layers(architecture, attended)
    is_indexed = _INDEXED in (getattr(architecture.base.config, "layer_types", None) or ())
    if not silent and not is_indexed:
        return None
    template = None if architecture.is_encoder_decoder else made_template(architecture, call)
    for (stack, number), layer in silent.items():
        problem = _problem(layer, number, template)
        if template is None or problem is not None:
            raise UnsupportedModelError(
                f"{architecture.name}: layer {number} of its {stack} ({type(layer).__name__}) {problem}. {tables.NO_ATTENTION_REMEDY}"
            )
        if template.attends(number):
            template.by_hand.add(number)
    return template


def made_template(architecture: Architecture, call: BodyCall) -> CacheTemplate | None:
    """Of the cache that the body makes by itself for the tokens of the probe; None where it makes none."""
    if not any(name in call.accepted for name in ARGUMENTS):
        return None
    output = architecture.base(**call.arguments | {"use_cache": True})
    made = next((found for name in ARGUMENTS if (found := getattr(output, name, None)) is not None), None)
    crosses = "encoder" in call.rows and isinstance(made, EncoderDecoderCache)
    return CacheTemplate(made, crosses) if isinstance(made, (Cache, EncoderDecoderCache)) else None


def _silent_layers(architecture: Architecture, attended: set[int]) -> dict[tuple[str, int], nn.Module]:
    """Layers of which the interface does not tell all, by stack and number."""
    return {
        (stack.name, number): layer
        for stack in architecture.stacks.values()
        for number, layer in enumerate(stack.layers)
        if not any(id(module) in attended for module in layer.modules()) or _has_convolution(layer)
    }


def _has_convolution(layer: nn.Module) -> bool:
    """Over tokens, whose neighbours it sees outside attention. In half precision the probe alone could overlook a small one."""
    return any(isinstance(part, nn.Conv1d) and part.kernel_size[0] > 1 for part in layer.modules())


def _problem(layer: nn.Module, number: int, template: CacheTemplate | None) -> str | None:
    if template is not None and template.odd is not None:
        return f"keeps, or is beside layers that keep, what is known of earlier tokens in a cache of a kind of its own ({template.odd})"
    if template is not None and template.has_state(number):
        return None
    if _has_convolution(layer):
        return "mixes neighbouring tokens by a convolution, whose last inputs it does not hand on"
    if template is not None and template.attends(number):
        return None
    return "neither sends its attention through transformers' attention interface nor hands keys and values, or a state, on in a cache"
