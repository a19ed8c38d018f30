"""Who routes: the routers that have a name."""

ROUTERS = {
    "token": "linear on the layer's input, token by token",
    "hidden": "linear on z, token by token",
    "sequence": "linear on the mean of the layer's input over the sequence",
    "task": "a table of logits by task id, or linear on an embedding of the task",
    "external": "gates that the caller gives with mosld.set_routing",
    "constant": "gates that are parameters themselves, the same for every token",
    "none": "all gates are one and nothing routes",
}
