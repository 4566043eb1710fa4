"""What is added to the server of transformers: checks of requests, a list of models."""

from halve.integrations.serving.middleware import extend_server
from halve.integrations.serving.rules import RequestRules, rules_for

__all__ = ["RequestRules", "extend_server", "rules_for"]
