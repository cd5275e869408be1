"""Plain torch answers the ops of attention on the CPU, from when this is imported until `close()`.

Processes that a caller starts import it, too, and end with it.
"""

from contextlib import ExitStack

from hubaoti.runtime.attention_ops import answer_by_reference

_stack = ExitStack()
_stack.enter_context(answer_by_reference("cpu"))
close = _stack.close
