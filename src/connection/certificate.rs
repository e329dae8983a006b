//! The two facts of a certificate (X.509, RFC 5280) that rustls does not tell: its common name, and the hash of its
//! signature.

use rustls::SupportedCipherSuite;
use rustls::crypto::ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384};

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
/// `[0]`, which holds the version where it is not 1.
const VERSION: u8 = 0xA0;
/// 2.5.4.3, `commonName`.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// Object identifiers of signature algorithms with the hash that `tls-server-end-point` takes for them (RFC 5929: the
/// signature's own, but SHA-256 in place of MD5 and SHA-1).
const SHA_256_SIGNATURES: [&[u8]; 5] = [
    // md5, sha1 and sha256WithRSAEncryption
    &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x04],
    &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x05],
    &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x0B],
    // ecdsa-with-SHA1 and -SHA256
    &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x01],
    &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, 0x02],
];
const SHA_384_SIGNATURES: [&[u8]; 2] = [
    // sha384WithRSAEncryption and ecdsa-with-SHA384
    &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x0C],
    &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03, 0x03],
];

/// The hash of a certificate for SCRAM's channel binding; `None` where its signature has another hash than SHA-256 or
/// SHA-384, and SCRAM goes without a binding.
pub(super) fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, certificate_body, _) = element(certificate)?;
    let (_, _, after_contents) = element(certificate_body)?;
    let algorithm = expect(SEQUENCE, after_contents)?.0;
    let (identifier, _) = expect(OBJECT_IDENTIFIER, algorithm)?;
    let suite = if SHA_256_SIGNATURES.contains(&identifier) {
        TLS13_AES_128_GCM_SHA256
    } else if SHA_384_SIGNATURES.contains(&identifier) {
        TLS13_AES_256_GCM_SHA384
    } else {
        return None;
    };
    match suite {
        SupportedCipherSuite::Tls13(suite) => Some(suite.common.hash_provider.hash(certificate).as_ref().to_vec()),
        SupportedCipherSuite::Tls12(_) => None,
    }
}

/// The common name in a certificate's subject; of several, the last, as in libpq.
pub(super) fn common_name(certificate: &[u8]) -> Option<String> {
    let (certificate_body, _) = expect(SEQUENCE, certificate)?;
    let (mut contents, _) = expect(SEQUENCE, certificate_body)?;
    if let Some((_, after)) = expect(VERSION, contents) {
        contents = after;
    }
    // serialNumber, signature, issuer, validity
    for _ in 0..4 {
        contents = element(contents)?.2;
    }
    let (mut subject, _) = expect(SEQUENCE, contents)?;
    let mut name = None;
    while let Some((mut attributes, after)) = expect(SET, subject) {
        subject = after;
        while let Some((attribute, after)) = expect(SEQUENCE, attributes) {
            attributes = after;
            let (identifier, value) = expect(OBJECT_IDENTIFIER, attribute)?;
            if identifier == COMMON_NAME {
                let (_, text, _) = element(value)?;
                name = Some(String::from_utf8(text.to_vec()).ok()?);
            }
        }
    }
    // A name with a NUL inside is an old trick to show one name to the signer and another to the reader.
    name.filter(|name| !name.contains('\0'))
}

/// Whether a common name, possibly `*.domain`, stands for a host; the star stands for one label.
pub(super) fn names_host(pattern: &str, host: &str) -> bool {
    let (pattern, host) = (pattern.to_ascii_lowercase(), host.to_ascii_lowercase());
    match pattern.strip_prefix('*') {
        Some(domain) if domain.starts_with('.') && domain.len() > 1 => {
            host.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == &domain[1..])
                && host.parse::<std::net::IpAddr>().is_err()
        }
        _ => pattern == host,
    }
}

/// The contents of the element that begins here, if it has that tag, and what follows it.
fn expect(tag: u8, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    element(bytes).filter(|&(found, _, _)| found == tag).map(|(_, contents, rest)| (contents, rest))
}

/// Tag, contents and rest: DER with a tag of one byte and a length of up to four.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, bytes) = bytes.split_first()?;
    let (&first, mut bytes) = bytes.split_first()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let (digits, after) =
            bytes.split_at_checked(usize::from(first & 0x7F)).filter(|(digits, _)| digits.len() <= 4)?;
        length = digits.iter().fold(0, |length, &digit| length << 8 | usize::from(digit));
        bytes = after;
    }
    let (contents, rest) = bytes.split_at_checked(length)?;
    Some((tag, contents, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_exactly_one_label() {
        assert!(names_host("db.example.com", "DB.example.com"));
        assert!(names_host("*.example.com", "db.example.com"));
        for host in ["example.com", "a.db.example.com", ".example.com", "dbxexample.com"] {
            assert!(!names_host("*.example.com", host), "{host}");
        }
        assert!(!names_host("*", "localhost"));
        assert!(!names_host("*.0.0.1", "127.0.0.1"));
    }

    #[test]
    fn what_is_not_a_certificate_has_neither_a_name_nor_a_hash() {
        for bytes in [&b""[..], &[0x30], &[0x30, 0x82, 0xFF], &[0x30, 0x85, 1, 1, 1, 1, 1], &[0x30, 0x02, 0x30, 0x00]] {
            assert_eq!(common_name(bytes), None);
            assert_eq!(end_point_hash(bytes), None);
        }
    }
}
