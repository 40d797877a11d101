//! Other servers as backends: scoutd, Ollama and whatever speaks the OpenAI protocol.
