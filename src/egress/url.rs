//! Addresses of requests: absolute, http or https, without credentials.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use hyper::Uri;
use hyper::http::uri::Scheme;

use super::EgressError;

/// An absolute `http` or `https` address. User names and passwords in it are refused: they would end in logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url(Uri);

impl Url {
    /// The name or address without brackets.
    pub fn host(&self) -> &str {
        let host = self.0.host().unwrap_or_default();
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    /// The port, said or implied.
    pub fn port(&self) -> u16 {
        self.0.port_u16().unwrap_or(if self.is_https() { 443 } else { 80 })
    }

    /// Whether it is encrypted.
    pub fn is_https(&self) -> bool {
        self.0.scheme() == Some(&Scheme::HTTPS)
    }

    /// The path, always beginning with `/`.
    pub fn path(&self) -> &str {
        self.0.path()
    }

    /// Whether both have the same scheme, host and port.
    pub fn same_origin(&self, other: &Url) -> bool {
        self.is_https() == other.is_https()
            && self.port() == other.port()
            && self.host().eq_ignore_ascii_case(other.host())
    }

    /// The same place with another path and query, which must begin with `/`.
    ///
    /// # Errors
    /// `Address` if that is no path.
    pub fn with_path(&self, path_and_query: &str) -> Result<Url, EgressError> {
        let (scheme, authority) = (self.scheme(), self.authority());
        format!("{scheme}://{authority}{path_and_query}").parse()
    }

    /// What a `Location` header means, seen from here (RFC 3986 §5.2, without relative paths: no server that
    /// we ask sends them).
    ///
    /// # Errors
    /// `Address` if it is no usable address.
    pub fn join(&self, location: &str) -> Result<Url, EgressError> {
        let location = location.split('#').next().unwrap_or_default().trim();
        if let Some(rest) = location.strip_prefix("//") {
            return format!("{}://{rest}", self.scheme()).parse();
        }
        if location.starts_with('/') {
            return self.with_path(location);
        }
        location.parse()
    }

    fn scheme(&self) -> &str {
        if self.is_https() { "https" } else { "http" }
    }

    fn authority(&self) -> &str {
        self.0.authority().map_or("", |authority| authority.as_str())
    }
}

impl FromStr for Url {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Url, EgressError> {
        let wrong = |reason: &str| EgressError::Address { message: format!("{reason}: {text}") };
        let uri: Uri = text.parse().map_err(|error| wrong(&format!("not an address ({error})")))?;
        let Some(authority) = uri.authority() else {
            return Err(wrong("not an absolute address"));
        };
        if authority.as_str().contains('@') {
            // Not repeated in the message: it may hold a password.
            let message = "an address may not hold a user name or password".to_owned();
            return Err(EgressError::Address { message });
        }
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(wrong("neither http nor https"));
        }
        let url = Url(uri);
        let bracketed = url.0.host().is_some_and(|host| host.starts_with('['));
        if url.host().is_empty() || bracketed && url.host().parse::<IpAddr>().is_err() {
            return Err(wrong("no host"));
        }
        // A port that is no port reads as none, and would silently be the usual one.
        let said = url.authority().len() > url.0.host().map_or(0, str::len);
        if said && url.0.port_u16().is_none_or(|port| port == 0) {
            return Err(wrong("no port"));
        }
        Ok(url)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<Url> for Uri {
    fn from(url: Url) -> Uri {
        url.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports() {
        let cases = [
            ("http://pi.local", "pi.local", 80),
            ("https://hub.example/api?x=1", "hub.example", 443),
            ("http://[fe80::1]:8080/", "fe80::1", 8080),
            ("HTTP://127.0.0.1:11434", "127.0.0.1", 11434),
        ];
        for (text, host, port) in cases {
            let url: Url = text.parse().unwrap();
            assert_eq!((url.host(), url.port()), (host, port), "{text}");
        }
        for bad in [
            "",
            "/api",
            "pi.local:80",
            "ftp://pi.local/",
            "http://",
            "http://a:b@pi.local/",
            "http://pi.local:/",
            "http://pi.local:0/",
            "http://pi.local:99999/",
            "http://[hello]/",
            "http://pi local/",
        ] {
            assert!(bad.parse::<Url>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_password_is_not_repeated() {
        let error = "http://me:secret@pi.local/".parse::<Url>().unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn locations() {
        let base: Url = "https://hub.example:8443/a/b?c".parse().unwrap();
        let cases = [
            ("/d/e", "https://hub.example:8443/d/e"),
            ("//cdn.example/f", "https://cdn.example/f"),
            ("http://other.example/g#h", "http://other.example/g"),
        ];
        for (location, expected) in cases {
            assert_eq!(base.join(location).unwrap().to_string(), expected);
        }
        assert!(base.join("relative").is_err());
        assert!(base.join("file:///etc/passwd").is_err());
        assert!(base.same_origin(&base.join("/x").unwrap()));
        assert!(!base.same_origin(&base.join("https://hub.example/x").unwrap()));
    }
}
