"""Native models over `stepgraph.layers`, checkpoint formats, tokenizers. Start at `resolve` and `load_model`."""

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.loader import load_model
from stepgraph.models.source import ModelSource, resolve

__all__ = ["Decoder", "DecoderConfig", "ModelSource", "load_model", "resolve"]
