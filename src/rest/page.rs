//! The one page for browsers, under a policy that lets it load nothing but itself.

use actix_web::HttpResponse;
use actix_web::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_FRAME_OPTIONS,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

const HTML: &str = include_str!("../../web/index.html");

/// The page and its policy, which names its script and its style by their digests.
pub(super) struct Page {
    policy: String,
}

impl Page {
    pub(super) fn new() -> Page {
        let policy = format!(
            "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            digest("<script>", "</script>"),
            digest("<style>", "</style>"),
        );
        Page { policy }
    }

    pub(super) fn response(&self) -> HttpResponse {
        HttpResponse::Ok()
            .insert_header((CONTENT_TYPE, "text/html; charset=utf-8"))
            .insert_header((CONTENT_SECURITY_POLICY, self.policy.as_str()))
            .insert_header((X_FRAME_OPTIONS, "DENY"))
            .insert_header((REFERRER_POLICY, "no-referrer"))
            .insert_header((CACHE_CONTROL, "no-cache"))
            .body(HTML)
    }
}

/// The digest of what stands between two tags, as a policy names it; nothing is allowed if there is nothing.
fn digest(open: &str, close: &str) -> String {
    let inside = HTML
        .split_once(open)
        .and_then(|(_, rest)| rest.split_once(close))
        .map(|(inside, _)| inside);
    match inside {
        Some(inside) => format!("'sha256-{}'", STANDARD.encode(Sha256::digest(inside.as_bytes()))),
        None => "'none'".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_and_needs_nothing_else() {
        assert!(HTML.len() < 100_000);
        assert_eq!(HTML.matches("<script").count(), 1);
        assert_eq!(HTML.matches("<style").count(), 1);
        for foreign in ["https://", "src=", "@import", "url(", "onclick", "style=", "innerHTML"] {
            assert!(!HTML.contains(foreign), "{foreign}");
        }
        assert_eq!(Page::new().policy.matches("sha256-").count(), 2);
    }
}
