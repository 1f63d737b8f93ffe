"""Writing answers to prompts: with a loaded model or any OpenAI-compatible server, resumable and reproducible."""

from .decoding import Decoding, Generation
from .endpoint import Endpoint
from .fingerprint import model_fingerprint
from .local import load
from .run import generate, read_generations

__all__ = ["Decoding", "Endpoint", "Generation", "generate", "load", "model_fingerprint", "read_generations"]
