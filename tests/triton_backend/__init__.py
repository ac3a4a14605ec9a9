"""The Triton backend's own tests: on the CPU by the interpreter, on a GPU compiled."""
