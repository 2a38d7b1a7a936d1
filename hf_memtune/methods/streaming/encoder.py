"""The encoder of an encoder-decoder model runs as it is; its output is an ordinary input of the decoder's stream."""

from hf_memtune.methods.attention.batch import BodyCall


def encode(call: BodyCall) -> BodyCall:
    """The call, with the output of its encoder (B, T, D) among its inputs, where it has an encoder that has not run."""
    architecture = call.architecture
    if architecture.is_encoder_decoder and call.encoded is None:
        call.give_encoded(architecture.stacks["encoder"].module(**call.encoder_arguments()).last_hidden_state)
    return call
