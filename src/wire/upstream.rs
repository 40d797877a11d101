//! Shapes of requests to other servers and of what they answer: OpenAI's, Ollama's, and scoutd's own.
//!
//! Answers are a stranger's: what is read is typed and bounded, everything else in them is skipped unread.

mod answer;
mod line;
mod node;
mod owner;
mod request;

pub use answer::{
    CallPiece, Piece, UpstreamError, read_ollama_models, read_ollama_piece, read_openai_piece,
    read_top_logprobs,
};
pub use line::{Capacity, Claim, capacity, claimed, read_capacity_url};
pub use node::{
    NodeModel, NodeReport, ScoreBody, node_report, read_node_report, read_score_reply, score_body,
    score_reply,
};
pub use owner::{
    CalibrationBody, CalibrationLine, CandidateReport, MemberBody, PeerReport, PoolReport,
    calibration_report, pool_report, read_calibration_report, read_error, read_pool_report,
};
pub use request::{Dialect, chat_body, label_body};
