//! Shapes of requests to other servers and of what they answer: OpenAI's, Ollama's, and scoutd's own.
//!
//! Answers are a stranger's: what is read is typed and bounded, everything else in them is skipped unread.

mod answer;
mod node;
mod request;

pub use answer::{
    CallPiece, Piece, UpstreamError, read_ollama_models, read_ollama_piece, read_openai_piece,
    read_top_logprobs,
};
pub use node::{
    CandidateReport, MemberBody, NodeModel, NodeReport, PeerReport, PoolReport, ScoreBody,
    node_report, pool_report, read_node_report, read_score_reply, score_body, score_reply,
};
pub use request::{Dialect, chat_body, label_body};
