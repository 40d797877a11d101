//! Messages and tools to a prompt, and a model's output back to text and tool calls.
