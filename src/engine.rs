//! The local engine: admission, scheduling, sampling, and the thread that runs the model.
