//! TLS to the broker: our own rustls configuration, because rumqttc's would need a process-wide provider.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use super::MqttError;

/// Trusts the certificates of `ca_pem` and no others, or without it the system's.
///
/// # Errors
/// No certificate can be used.
pub(super) fn client_config(ca_pem: Option<&[u8]>) -> Result<Arc<ClientConfig>, MqttError> {
    let mut roots = RootCertStore::empty();
    match ca_pem {
        Some(pem) => pin(&mut roots, pem)?,
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        let source = if ca_pem.is_some() { "mqtt.ca_file" } else { "the system's store" };
        return Err(MqttError::Tls(format!("no certificate in {source}")));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| MqttError::Tls(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn pin(roots: &mut RootCertStore, pem: &[u8]) -> Result<(), MqttError> {
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate =
            certificate.map_err(|error| MqttError::Tls(format!("mqtt.ca_file: {error}")))?;
        roots.add(certificate).map_err(|error| MqttError::Tls(format!("mqtt.ca_file: {error}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_certificate_is_refused() {
        for pem in
            [&b""[..], b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
        {
            let error = client_config(Some(pem)).expect_err("no certificate in it").to_string();
            assert!(error.contains("mqtt.ca_file"), "{error}");
        }
    }
}
