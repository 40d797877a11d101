//! The hub's protocol: what a repository holds, and the bytes of its files.
//!
//! A file is asked for at `/REPO/resolve/COMMIT/PATH`; the hub answers itself or redirects to a host that stores
//! large files. The token goes to the hub only, never along a redirect to elsewhere; each hop's address is
//! checked: a hub outside the house cannot send us to an address inside it.

use std::time::Duration;

use serde::Deserialize;

use super::choice::RemoteFile;
use super::error::StoreError;
use super::reference::{Repo, escape};
use crate::egress::{
    Client, ClientConfig, HeaderMap, Method, Reach, Request, Response, Scope, Url, header, scope_of,
};

/// How the hub is reached.
#[derive(Clone)]
pub struct Access {
    /// The hub or its mirror.
    pub base: Url,
    /// What is sent to `base` and to nobody else.
    pub token: Option<Token>,
    /// Certificates (PEM) that are trusted beside the system's.
    pub extra_ca_pem: Option<Vec<u8>>,
    /// When to try again.
    pub retry: Retry,
}

/// A secret that is never printed.
#[derive(Clone)]
pub struct Token(String);

/// When a failed request is tried again.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Failures in a row before giving up; bytes that came end the row.
    pub failures_max: u32,
    /// Before the second try; doubled each time.
    pub first: Duration,
    /// Never longer, and a server that asks for more is not waited for.
    pub longest: Duration,
    /// The longest silence.
    pub stall: Duration,
}

impl Default for Retry {
    fn default() -> Retry {
        Retry {
            failures_max: 6,
            first: Duration::from_millis(500),
            longest: Duration::from_secs(120),
            stall: Duration::from_secs(60),
        }
    }
}

impl Token {
    /// From a file's or a variable's text; `None` if it is empty.
    ///
    /// # Errors
    /// If it cannot stand in a header.
    pub fn new(text: &str) -> Result<Option<Token>, StoreError> {
        let text = text.trim();
        if text.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err(StoreError::Config("the hub's token is no single word".to_owned()));
        }
        Ok((!text.is_empty()).then(|| Token(text.to_owned())))
    }
}

/// A repository at one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    pub repo: Repo,
    /// The commit that the files are taken from.
    pub commit: String,
    pub files: Vec<RemoteFile>,
    /// The licence's short name, as `apache-2.0`.
    pub license: Option<String>,
    /// Where its text is.
    pub license_link: Option<String>,
}

/// An open answer to a request for a file.
pub(super) struct Opened {
    pub(super) response: Response,
    /// The file's size and SHA-256 as the hub itself says, if it says them.
    pub(super) linked_bytes: Option<u64>,
    pub(super) linked_sha256: Option<String>,
}

impl Opened {
    /// The first byte of the answer: 0 for a whole file, `Content-Range`'s for a part.
    pub(super) fn begins_at(&self) -> Option<u64> {
        match self.response.status {
            206 => Some(self.content_range()?.0),
            _ => Some(0),
        }
    }

    /// The size of the whole file, as the answer tells it.
    pub(super) fn whole_size(&self) -> Option<u64> {
        match self.response.status {
            206 => self.content_range()?.1,
            _ => self.response.header("content-length")?.parse().ok(),
        }
    }

    /// `bytes 5-9/10`: the first byte and the whole size.
    fn content_range(&self) -> Option<(u64, Option<u64>)> {
        let text = self.response.header("content-range")?.strip_prefix("bytes ")?;
        let (range, size) = text.split_once('/')?;
        let (start, _) = range.split_once('-')?;
        Some((start.trim().parse().ok()?, size.trim().parse().ok()))
    }

    /// The ETag of the bytes; a weak one says nothing about them.
    pub(super) fn strong_etag(&self) -> Option<String> {
        let etag = self.response.header("etag")?;
        (etag.starts_with('"') && etag.len() <= 256).then(|| etag.to_owned())
    }
}

/// The hub.
#[derive(Clone)]
pub struct Hub {
    client: Client,
    /// For hops that a hub outside the house leads to.
    outside: Client,
    base: Url,
    token: Option<Token>,
    pub(super) retry: Retry,
}

impl Hub {
    /// Nothing is sent yet.
    ///
    /// # Errors
    /// If the token would travel unencrypted, or the certificates cannot be used.
    pub fn new(access: Access) -> Result<Hub, StoreError> {
        let Access { base, token, extra_ca_pem, retry } = access;
        if token.is_some() && !base.is_https() && !is_loopback(&base) {
            return Err(StoreError::Config(format!(
                "the token would travel unencrypted to {base}; use https, or store.mirror, which gets no token"
            )));
        }
        let client = |reach| {
            Client::new(ClientConfig {
                stall_timeout: Some(retry.stall),
                extra_ca_pem: extra_ca_pem.clone(),
                ..ClientConfig::new(reach)
            })
        };
        let (client, outside) = (client(Reach::Anywhere)?, client(Reach::Wan)?);
        Ok(Hub { client, outside, base, token, retry })
    }

    /// Where it is.
    pub fn base(&self) -> &Url {
        &self.base
    }

    /// What a repository holds at `revision` (a branch, tag or commit), by default at its main branch.
    ///
    /// # Errors
    /// If it is not there, not for us, or the hub does not answer.
    pub async fn repository(
        &self,
        repo: &Repo,
        revision: Option<&str>,
    ) -> Result<Repository, StoreError> {
        let revision =
            revision.map(|name| format!("/revision/{}", escape(name).replace('/', "%2F")));
        let path = format!("/api/models/{repo}{}?blobs=true", revision.unwrap_or_default());
        let body = self.patiently(async || {
            let mut opened = self.open(Method::GET, &path, repo, HeaderMap::new()).await?;
            Ok(opened.response.body(LISTING_BYTES_MAX).await?)
        });
        let body = body.await?;
        let listing: Listing = serde_json::from_slice(&body).map_err(|error| {
            StoreError::Hub(format!("{} does not speak the hub's protocol: {error}", self.base))
        })?;
        listing.into_repository(repo)
    }

    /// Opens a file at `commit`, from byte `start` on and up to `end` (exclusive) if that is given.
    /// `validator` is the ETag of the bytes that are there already.
    pub(super) async fn file(
        &self,
        repo: &Repo,
        commit: &str,
        path: &str,
        (start, end): (u64, Option<u64>),
        validator: Option<&str>,
    ) -> Result<Opened, StoreError> {
        let mut headers = HeaderMap::new();
        // What is compressed on the way has no ranges.
        headers.insert(header::ACCEPT_ENCODING, header::HeaderValue::from_static("identity"));
        let range = match (start, end) {
            (0, None) => None,
            (start, None) => Some(format!("bytes={start}-")),
            (start, Some(end)) => Some(format!("bytes={start}-{}", end.saturating_sub(1))),
        };
        let mut put = |name, text: Option<&str>| {
            if let Some(value) = text.and_then(|text| header::HeaderValue::from_str(text).ok()) {
                headers.insert(name, value);
            }
        };
        put(header::RANGE, range.as_deref());
        put(header::IF_RANGE, range.as_ref().and(validator));
        let path = format!("/{repo}/resolve/{}/{}", escape(commit), escape(path));
        self.open(Method::GET, &path, repo, headers).await
    }

    /// Repeats what fails for reasons that pass.
    pub(super) async fn patiently<T>(
        &self,
        work: impl AsyncFn() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut failures = 0;
        loop {
            let error = match work().await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            failures += 1;
            match self.retry.wait(&error, failures) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(error),
            }
        }
    }

    /// Follows redirects; returns an answer with a status of success.
    async fn open(
        &self,
        method: Method,
        path: &str,
        repo: &Repo,
        headers: HeaderMap,
    ) -> Result<Opened, StoreError> {
        let mut url = self.base.with_path(path)?;
        let mut is_hub = true;
        let mut inside = false;
        let (mut linked_bytes, mut linked_sha256) = (None, None);
        for _ in 0..=REDIRECTS_MAX {
            let request = Request {
                method: method.clone(),
                url: url.clone(),
                headers: self.headers(&headers, is_hub),
                body: Default::default(),
            };
            let client = if is_hub || inside { &self.client } else { &self.outside };
            let response = client.send(request).await?;
            if is_hub {
                inside = scope_of(response.remote.ip()) == Scope::Lan;
                linked_bytes = linked_bytes.or_else(|| linked_size(&response));
                linked_sha256 = linked_sha256.or_else(|| linked_digest(&response));
            }
            match response.status {
                200 | 206 => return Ok(Opened { response, linked_bytes, linked_sha256 }),
                301 | 302 | 303 | 307 | 308 => {
                    let next = next_hop(&url, &response)?;
                    // Once away from the hub, the token stays behind for good.
                    is_hub = is_hub && next.same_origin(&self.base);
                    url = next;
                }
                _ => return Err(self.refusal(&url, is_hub, repo, response).await),
            }
        }
        let reason = "too many redirects";
        Err(StoreError::Redirect { from: self.base.to_string(), to: url.host().to_owned(), reason })
    }

    fn headers(&self, headers: &HeaderMap, is_hub: bool) -> HeaderMap {
        let mut headers = headers.clone();
        let token = self.token.as_ref().filter(|_| is_hub);
        let value =
            token.map(|token| header::HeaderValue::from_str(&format!("Bearer {}", token.0)));
        if let Some(Ok(mut value)) = value {
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        headers
    }

    /// What a status that is no success means, and what to do about it.
    async fn refusal(
        &self,
        url: &Url,
        is_hub: bool,
        repo: &Repo,
        mut response: Response,
    ) -> StoreError {
        let host = url.host().to_owned();
        let status = response.status;
        if status == 429 {
            let after = retry_after(&response).unwrap_or(Duration::ZERO);
            return StoreError::RateLimited { host, after };
        }
        if !is_hub || !matches!(status, 401 | 403 | 404) {
            return StoreError::Server { host, status };
        }
        let code = response.header("x-error-code").map(str::to_owned);
        let message = response.header("x-error-message").map(plain);
        // An answer that is read to its end leaves the connection usable.
        let _ = response.body(ERROR_BYTES_MAX).await;
        let base = self.base.to_string();
        let base = base.trim_end_matches('/');
        let get_token = format!(
            "make a token at {base}/settings/tokens and give it as HF_TOKEN or in store.token_file"
        );
        match (code.as_deref(), status) {
            (Some("GatedRepo"), 401) => StoreError::Gated {
                repo: repo.to_string(),
                what_to_do: format!("accept its terms at {base}/{repo}, then {get_token}"),
            },
            (Some("GatedRepo"), _) => StoreError::Gated {
                repo: repo.to_string(),
                what_to_do: format!("accept its terms at {base}/{repo} with the token's account"),
            },
            (Some("RevisionNotFound"), _) => {
                StoreError::NotFound(format!("{repo} has no such revision"))
            }
            (Some("EntryNotFound"), _) => {
                StoreError::NotFound(format!("{repo} has no {}", url.path()))
            }
            (_, 401) if self.token.is_some() => {
                StoreError::Unauthorized(format!("{base} does not accept the token for {repo}"))
            }
            // The hub does not tell a stranger whether a repository exists.
            (_, 401) => StoreError::Unauthorized(format!(
                "{base} has no {repo}, or not for everybody; for a private one {get_token}"
            )),
            (_, 403) => {
                let why = message.unwrap_or_else(|| "no reason given".to_owned());
                StoreError::Unauthorized(format!("{base} refuses {repo}: {why}"))
            }
            _ => StoreError::NotFound(format!("{base} has no {repo}")),
        }
    }
}

impl Retry {
    /// How long to wait after the `failures`-th failure in a row; `None` gives up.
    pub(super) fn wait(&self, error: &StoreError, failures: u32) -> Option<Duration> {
        if !error.is_transient() || failures >= self.failures_max {
            return None;
        }
        let own = self.first.saturating_mul(1 << (failures - 1).min(16)).min(self.longest);
        match error {
            StoreError::RateLimited { after, .. } if *after > self.longest => None,
            StoreError::RateLimited { after, .. } => Some((*after).max(own)),
            _ => Some(own),
        }
    }
}

fn next_hop(from: &Url, response: &Response) -> Result<Url, StoreError> {
    let refuse = |to: &str, reason| StoreError::Redirect {
        from: from.host().to_owned(),
        to: plain(to),
        reason,
    };
    let location = response.header("location").unwrap_or_default();
    if location.is_empty() {
        return Err(refuse("nowhere", "no Location"));
    }
    let next = from.join(location).map_err(|_| refuse(location, "no usable address"))?;
    if from.is_https() && !next.is_https() {
        return Err(refuse(next.host(), "from https to http"));
    }
    Ok(next)
}

fn linked_size(response: &Response) -> Option<u64> {
    response.header("x-linked-size")?.parse().ok()
}

/// The hub's ETag of a large file is its SHA-256; of a small one it is another hash.
fn linked_digest(response: &Response) -> Option<String> {
    let etag = response.header("x-linked-etag").or(response.header("etag"))?;
    let digest = etag.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
    is_sha256(&digest).then_some(digest)
}

pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// `Retry-After` in seconds, or `t=` of the hub's `RateLimit` header.
fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = |text: &str| text.trim().parse().ok().map(Duration::from_secs);
    if let Some(after) = response.header("retry-after").and_then(seconds) {
        return Some(after);
    }
    let limit = response.header("ratelimit")?;
    limit.split(';').find_map(|part| part.trim().strip_prefix("t=")).and_then(seconds)
}

fn is_loopback(url: &Url) -> bool {
    url.host() == "localhost"
        || url.host().parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// What a server says, safe to print.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// `/api/models/REPO?blobs=true`.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
    #[serde(default, rename = "cardData")]
    card: Option<Card>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    #[serde(alias = "oid")]
    sha256: Option<String>,
    size: Option<u64>,
}

#[derive(Default, Deserialize)]
struct Card {
    #[serde(default)]
    license: Option<serde_json::Value>,
    #[serde(default)]
    license_name: Option<String>,
    #[serde(default)]
    license_link: Option<String>,
}

impl Listing {
    fn into_repository(self, repo: &Repo) -> Result<Repository, StoreError> {
        if !(7..=64).contains(&self.sha.len())
            || !self.sha.bytes().all(|byte| byte.is_ascii_hexdigit())
        {
            return Err(StoreError::Hub(format!("{repo}: the hub names no commit")));
        }
        let files =
            self.siblings.into_iter().filter(|file| super::reference::is_path(&file.rfilename));
        let files = files.map(|file| {
            let lfs = file.lfs.unwrap_or(Lfs { sha256: None, size: None });
            RemoteFile {
                path: file.rfilename,
                bytes: lfs.size.or(file.size),
                sha256: lfs
                    .sha256
                    .map(|digest| digest.to_ascii_lowercase())
                    .filter(|digest| is_sha256(digest)),
            }
        });
        let card = self.card.unwrap_or_default();
        let text = |value: serde_json::Value| match value {
            serde_json::Value::String(text) => Some(text),
            serde_json::Value::Array(list) => list.first()?.as_str().map(str::to_owned),
            _ => None,
        };
        // `other` is what is said of licences with a name of their own.
        let short = card.license.and_then(text).filter(|name| name != "other");
        Ok(Repository {
            repo: repo.clone(),
            commit: self.sha,
            files: files.collect(),
            license: short.or(card.license_name).map(|name| plain(&name)),
            license_link: card.license_link.map(|link| plain(&link)),
        })
    }
}

const REDIRECTS_MAX: u32 = 5;
const LISTING_BYTES_MAX: usize = 16 << 20;
const ERROR_BYTES_MAX: usize = 64 << 10;
