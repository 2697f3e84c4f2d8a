"""Client of any OpenAI-compatible endpoint: requests, retries, a ledger so that no answer is paid twice, cost."""

from .chat import ChatRequest, user_message
from .client import EndpointClient, Reply

__all__ = ["ChatRequest", "EndpointClient", "Reply", "user_message"]
