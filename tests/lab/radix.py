"""A replica's prefix cache: a radix tree over token pages, least recently used leaves out first.

Tokens are bytes, TOKEN of them each, so that prefixes are compared at memcmp's speed. As SGLang's RadixCache: a
node is a run of whole pages, nodes split where prompts part, a request locks the path it uses, and only leaves
that nobody locks are evicted, whole.
"""

import heapq
from itertools import count

TOKEN = 4  # bytes


class Node:
    """A run of tokens that follows its parent's."""

    __slots__ = ("children", "last_used", "locks", "parent", "queued", "tokens")

    def __init__(self, tokens: bytes, parent: "Node | None", last_used: int) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.locks = 0
        self.last_used = last_used
        self.queued = False  # for eviction; its place there may be out of date


class RadixCache:
    """What is cached, in tokens. It has no capacity of its own: its user evicts what it needs."""

    def __init__(self, page_size: int = 1) -> None:
        self._page = page_size * TOKEN
        self._root = Node(b"", None, 0)
        self._root.locks = 1
        self._clock = 0
        self._order = count()
        self._evictable_leaves: list[tuple[int, int, Node]] = []
        self.cached = 0  # tokens in the tree
        self.locked = 0  # of these, tokens that cannot be evicted

    @property
    def evictable(self) -> int:
        """Tokens that eviction could free."""
        return self.cached - self.locked

    @property
    def root(self) -> Node:
        return self._root

    def match(self, tokens: bytes) -> tuple[Node, int]:
        """The deepest node of the longest cached prefix in whole pages, and that prefix's length in tokens.

        The path becomes the most recently used. A node is split where the prefix ends inside it.
        """
        self._clock += 1
        node, at = self._descend(self._root, tokens, 0)
        return node, at // TOKEN

    def predict(self, tokens: bytes) -> int:
        """How many tokens `match` would find. Nothing is touched or split: for an oracle that only looks."""
        node, at = self._root, 0
        while (child := node.children.get(tokens[at : at + self._page])) is not None:
            common = self._common(child.tokens, tokens, at)
            at += common
            if common < len(child.tokens):
                break
            node = child
        return at // TOKEN

    def insert(self, node: Node, tokens: bytes) -> tuple[Node, int]:
        """Cache `tokens` after `node`; a last page that is not whole is left out.

        Returns the deepest node of it, and how many tokens were new.
        """
        self._clock += 1
        whole = len(tokens) - len(tokens) % self._page
        node, at = self._descend(node, tokens, 0, whole)
        if at == whole:
            return node, 0
        leaf = Node(tokens[at:whole], node, self._clock)
        node.children[tokens[at : at + self._page]] = leaf
        new = (whole - at) // TOKEN
        self.cached += new
        self._queue(leaf)
        return leaf, new

    def lock(self, node: Node) -> None:
        """Keep the path to this node from eviction."""
        step: Node | None = node
        while step is not None:
            if step.locks == 0:
                self.locked += len(step.tokens) // TOKEN
            step.locks += 1
            step = step.parent

    def unlock(self, node: Node) -> None:
        step: Node | None = node
        while step is not None:
            step.locks -= 1
            if step.locks == 0:
                self.locked -= len(step.tokens) // TOKEN
                if not step.children:
                    self._queue(step)
            step = step.parent

    def evict(self, tokens: int) -> int:
        """Evict leaves, the least recently used first, until `tokens` are free. Returns how many were."""
        freed = 0
        leaves = self._evictable_leaves
        while freed < tokens and leaves:
            queued_at, _, node = heapq.heappop(leaves)
            node.queued = False
            if node.locks or node.children:
                continue
            if node.last_used != queued_at:
                self._queue(node)
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[node.tokens[: self._page]]
            freed += len(node.tokens) // TOKEN
            if not parent.children and not parent.locks:
                self._queue(parent)
        self.cached -= freed
        return freed

    def _descend(self, node: Node, tokens: bytes, at: int, end: int | None = None) -> tuple[Node, int]:
        """Follow `tokens` from `node` on. Returns where it ends, split if need be, and the offset reached."""
        clock, page = self._clock, self._page
        end = len(tokens) if end is None else end
        while at < end and (child := node.children.get(tokens[at : at + page])) is not None:
            child.last_used = clock
            common = self._common(child.tokens, tokens, at)
            at += common
            if common < len(child.tokens):
                return self._split(child, common), at
            node = child
        return node, at

    def _common(self, run: bytes, tokens: bytes, at: int) -> int:
        """Bytes, in whole pages, that `run` shares with `tokens` from `at` on."""
        size = len(run)
        other = tokens[at : at + size]
        if run == other:
            return size
        low, high = 0, min(size, len(other)) // self._page
        while low < high:
            middle = (low + high + 1) // 2
            if run[low * self._page : middle * self._page] == other[low * self._page : middle * self._page]:
                low = middle
            else:
                high = middle - 1
        return low * self._page

    def _split(self, node: Node, size: int) -> Node:
        """Cut a node in two after `size` bytes. Returns the new upper half; the object itself stays the lower."""
        parent = node.parent
        assert parent is not None
        upper = Node(node.tokens[:size], parent, node.last_used)
        upper.locks = node.locks
        parent.children[node.tokens[: self._page]] = upper
        node.tokens = node.tokens[size:]
        node.parent = upper
        upper.children[node.tokens[: self._page]] = node
        return upper

    def _queue(self, node: Node) -> None:
        if not node.queued:
            node.queued = True
            heapq.heappush(self._evictable_leaves, (node.last_used, next(self._order), node))
