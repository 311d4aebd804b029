"""What docs/ has that is written from the code: the page of commands, and the pictures. `make docs` writes it anew."""

from tests.docs import bars, blocks, cli_page, life, rollout, states

MADE = {
    "docs/cli.md": cli_page.page,
    "docs/pictures/blocks.svg": blocks.picture,
    "docs/pictures/life.svg": life.picture,
    "docs/pictures/states.svg": states.picture,
    "docs/pictures/rollout.svg": rollout.picture,
    "docs/pictures/relay.svg": bars.relay,
    "docs/pictures/routing.svg": bars.routing,
    "docs/pictures/simulated.svg": bars.simulated,
}
