"""One multi-task model out of separately trained ones: task vectors, and the methods that merge them."""
