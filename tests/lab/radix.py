"""A replica's prefix cache: a radix tree over token pages that evicts the least recently used leaves first.

A token is TOKEN bytes, so that prefixes are compared at memcmp's speed. As in SGLang's RadixCache, a node is a run of
whole pages, nodes split where prompts part, a request holds the path that it uses, and only leaves that no request
holds are evicted, whole. A path counts as used when it is let go, which is when SGLang last touches it.
"""

from collections import OrderedDict

TOKEN = 4  # bytes


class Node:
    """A run of tokens that follows that of its parent."""

    __slots__ = ("children", "holders", "parent", "tokens")

    def __init__(self, tokens: bytes, parent: "Node | None", holders: int = 0) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.holders = holders  # requests that use it, or something below it


class RadixCache:
    """The cached prefixes. It has no capacity of its own: the caller evicts as many tokens as it needs."""

    def __init__(self, page_size: int = 1) -> None:
        self._page = page_size * TOKEN
        self.root = Node(b"", None, holders=1)
        # Nodes that no request holds, the least recently used first. A node comes after all nodes below it, since a
        # request that holds one of those also holds this one. So each is a leaf when its turn to be evicted comes.
        self._idle: OrderedDict[Node, None] = OrderedDict()
        self.cached = 0  # tokens in the tree
        self.held = 0  # of these, tokens that cannot be evicted

    @property
    def evictable(self) -> int:
        """Tokens that eviction could free."""
        return self.cached - self.held

    def hold(self, tokens: bytes) -> tuple[Node, int]:
        """Hold the longest cached prefix in whole pages. Returns its deepest node, and its length in tokens."""
        node, at = self._descend(self.root, tokens)
        self._hold(node, self.root)
        return node, at // TOKEN

    def extend(self, node: Node, tokens: bytes) -> Node:
        """Cache `tokens`, whole pages, below a node that is held, and hold them instead. Returns the deepest node."""
        deepest, at = self._descend(node, tokens)
        if at < len(tokens):
            deepest.children[tokens[at : at + self._page]] = leaf = Node(tokens[at:], deepest)
            self.cached += (len(tokens) - at) // TOKEN
            deepest = leaf
        self._hold(deepest, node)
        return deepest

    def let_go(self, node: Node) -> None:
        """End one hold."""
        step = node
        while step is not self.root:
            step.holders -= 1
            if not step.holders:
                self.held -= len(step.tokens) // TOKEN
                self._idle[step] = None
            assert step.parent is not None
            step = step.parent

    def evict(self, tokens: int) -> None:
        """Evict leaves, the least recently used first, until at least `tokens` are free or nothing is left."""
        freed = 0
        while freed < tokens and self._idle:
            node, _ = self._idle.popitem(last=False)
            assert node.parent is not None
            del node.parent.children[node.tokens[: self._page]]
            freed += len(node.tokens) // TOKEN
        self.cached -= freed

    def predict(self, tokens: bytes) -> int:
        """How many tokens `hold` would find, for an oracle that only looks."""
        node, at = self.root, 0
        while (child := node.children.get(tokens[at : at + self._page])) is not None:
            common = self._common(child.tokens, tokens, at)
            at += common
            if common < len(child.tokens):
                break
            node = child
        return at // TOKEN

    def _hold(self, node: Node, above: Node) -> None:
        while node is not above:
            if not node.holders:
                self.held += len(node.tokens) // TOKEN
                self._idle.pop(node, None)
            node.holders += 1
            assert node.parent is not None
            node = node.parent

    def _descend(self, node: Node, tokens: bytes) -> tuple[Node, int]:
        """Follow `tokens` down from `node`, and split a node where they end or part.

        Returns the deepest node that matches, and how many bytes match.
        """
        page, at = self._page, 0
        while (child := node.children.get(tokens[at : at + page])) is not None:
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
        page = self._page
        low, high = 0, min(size, len(other)) // page
        while low < high:
            middle = (low + high + 1) // 2
            if run[low * page : middle * page] == other[low * page : middle * page]:
                low = middle
            else:
                high = middle - 1
        return low * page

    def _split(self, node: Node, size: int) -> Node:
        """Cut a node in two after `size` bytes. Returns the new upper half; the object itself stays the lower."""
        parent = node.parent
        assert parent is not None
        # The caller holds the upper half next, and letting go puts it in its place among the idle nodes.
        upper = Node(node.tokens[:size], parent, node.holders)
        parent.children[node.tokens[: self._page]] = upper
        node.tokens = node.tokens[size:]
        node.parent = upper
        upper.children[node.tokens[: self._page]] = node
        return upper
