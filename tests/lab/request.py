"""One request as the model sees it: what it asks for, and what became of it."""

from tests.lab.radix import TOKEN, Node


class Request:
    """A prompt to answer. A token is TOKEN bytes; times are the model's."""

    __slots__ = (
        "aborted",
        "arrived_at",
        "cached_tokens",
        "finish_step",
        "finished_at",
        "first_token_at",
        "joined_step",
        "kept",
        "made",
        "node",
        "number",
        "output",
        "output_tokens",
        "private",
        "prompt",
        "retractions",
        "started_at",
        "tokens",
    )

    def __init__(self, prompt: bytes, output_tokens: int, output: bytes = b"") -> None:
        """`output`: the tokens it will make; by default, tokens that no other request makes."""
        if not prompt or len(prompt) % TOKEN:
            raise ValueError(f"a prompt is whole tokens of {TOKEN} bytes, at least one")
        if output_tokens < 1:
            raise ValueError("a request makes at least one token")
        self.prompt = prompt
        self.output = output
        self.output_tokens = output_tokens
        self.arrived_at = 0.0
        self.started_at: float | None = None  # when its first prefill step began
        self.first_token_at: float | None = None
        self.finished_at: float | None = None  # or when it was aborted, if `aborted`
        self.aborted = False
        self.cached_tokens = 0
        self.retractions = 0
        # For the scheduler:
        self.number = 0
        self.tokens = prompt  # to prefill: the prompt and, after a retraction, what was made
        self.node: Node | None = None  # the deepest node of it in the tree, locked
        self.kept = 0  # bytes of it in the tree, up to that node
        self.private = 0  # tokens of it in the pool but not in the tree
        self.made = 0  # tokens made before it joined the batch
        self.joined_step = 0
        self.finish_step = 0

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // TOKEN

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token, once there is one."""
        assert self.first_token_at is not None
        return self.first_token_at - self.arrived_at
