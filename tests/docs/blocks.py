"""The whole on one picture: clients, the balancer's parts, replicas with their GPUs, and who starts and stops them."""

from balancer.config import Config
from tests.docs.svg import Picture


def picture() -> str:
    (_, port), (_, admin) = Config().listen, Config().admin
    p = Picture(
        920,
        440,
        "groundserve at a glance",
        "Clients send OpenAI requests to the balancer's endpoint. It checks keys, keeps requests in a queue while all "
        "replicas are full, chooses a replica by policy and relays the answer. Each replica is SGLang on a GPU of its "
        "own. groundserve up or docker compose starts, scales and updates them. The admin port shows how all are.",
    )
    p.text(22, 38, "One endpoint over all the GPUs you own", "h")
    p.box(22, 145, 158, 76, ("Your programs", "OpenAI or Anthropic", "clients, curl"))
    p.frame(240, 60, 330, 250, "balancer")
    p.text(556, 82, f"endpoint :{port}", "e c a")
    p.box(428, 100, 128, 138, ("fleet", "which replicas are", "ready, how busy,", "what each has", "in its cache"))
    for number, name in enumerate(("keys and limits", "one queue", "routing policy", "relay")):
        top = 100 + 50 * number
        p.box(262, top, 294 if name == "relay" else 150, 38, (name,), "mine")
        p.number(262, top + 19, number + 1)
        if number:
            p.arrow(((337, top - 12), (337, top)), "path")
    p.arrow(((428, 219), (412, 219)))
    p.arrow(((180, 183), (215, 183), (215, 119), (252, 119)), "path")
    for number, name in enumerate(("replica 1", "replica 2", "replica N")):
        top = 46 + 92 * number
        p.box(660, top, 238, 78, (name, "SGLang", ""))
        p.bar(680, top + 54, 198, 15, "o", "a GPU of its own")
        p.text(779, top + 65.5, "a GPU of its own", "m n")
        p.arrow(((556, 269), (615, 269), (615, top + 39), (660, top + 39)), "path")
    p.number(660, 46, 5)
    p.box(240, 356, 330, 62, (f"admin port :{admin}", "status, metrics, drain, page and playground"))
    p.arrow(((405, 356), (405, 310)))
    p.number(240, 356, 6)
    p.box(660, 356, 238, 62, ("controller", "groundserve up, or docker compose:", "starts, scales, updates"))
    p.arrow(((779, 356), (779, 308)))
    p.arrow(((660, 387), (570, 387)))
    p.number(660, 356, 7)
    p.box(22, 356, 158, 62, ("You", "browser, Prometheus"))
    p.arrow(((180, 387), (240, 387)))
    return p.document()
