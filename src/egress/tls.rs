//! Whom we trust over TLS: the system's authorities and what the configuration adds.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use super::EgressError;

/// A configuration that trusts the system's certificates and those of `extra_pem`. A system without any is
/// no error here: only a connection over TLS would fail.
///
/// # Errors
/// `Tls` if `extra_pem` holds no usable certificate.
pub(super) fn client_config(extra_pem: Option<&[u8]>) -> Result<Arc<ClientConfig>, EgressError> {
    let wrong = |message: String| EgressError::Tls { host: "certificates".to_owned(), message };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(pem) = extra_pem {
        let before = roots.len();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
            roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        }
        if roots.len() == before {
            return Err(wrong("no certificate in the configured file".to_owned()));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_certificate_is_refused() {
        assert!(client_config(None).is_ok());
        for pem in
            [&b""[..], b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
        {
            assert!(matches!(client_config(Some(pem)), Err(EgressError::Tls { .. })));
        }
    }
}
