//! What makers leave in a TPM's NV memory: the endorsement key's certificate and those between it and the maker's root.

use tss_esapi::abstraction::nv;
use tss_esapi::handles::{NvIndexTpmHandle, TpmHandle};
use tss_esapi::interface_types::resource_handles::NvAuth;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use super::device::Device;
use super::{EkKind, TpmError};

/// Certificates are 1 to 2 KiB; makers pad, but not beyond this.
const CERTIFICATE_MAX: usize = 8 * 1024;

/// NV indices of certificates between the endorsement key's and the maker's root, one behind the other (EK Credential Profile:
/// 0x01c00100 to 0x01c001ff). Intel's firmware TPM has them since the 11th generation of processors, all in the first.
const CHAIN: core::ops::Range<u32> = 0x01c0_0100..0x01c0_0108;

/// A verifier takes no more.
const CHAIN_MAX: usize = assay_evidence::ek::MAX_INTERMEDIATES;

/// The certificate of this endorsement key (DER), and behind it whatever leads from there towards the maker's root, if the TPM has it.
///
/// # Errors
/// Only those of a TPM that does not work.
pub(super) fn ek_certificate(device: &mut Device, kind: EkKind) -> Result<Option<Vec<u8>>, TpmError> {
    let what = "endorsement certificate";
    let Some(certificate) = read(device, kind.certificate(), what, CERTIFICATE_MAX)? else {
        return Ok(None);
    };
    let chain = read_chain(device)?;
    Ok(Some(with_issuers(&certificate, &chain).unwrap_or(certificate)))
}

/// Contents of an NV index that anybody may read. An index that is not there, cannot be read or is longer than `max` bytes is as good as
/// none: the operator pins the key by hash then.
///
/// # Errors
/// Only those of a TPM that does not work.
pub(super) fn read(
    device: &mut Device,
    index: u32,
    what: &'static str,
    max: usize,
) -> Result<Option<Vec<u8>>, TpmError> {
    const OPERATION: &str = "TPM2_NV_Read";
    if !device.has_handle(index)? {
        return Ok(None);
    }
    let handle = NvIndexTpmHandle::new(index).map_err(|source| TpmError::Refused {
        operation: OPERATION,
        source,
    })?;
    let read = device.run_authorised(OPERATION, |context| {
        let object =
            context.execute_without_session(|context| context.tr_from_tpm_public(TpmHandle::NvIndex(handle)))?;
        nv::read_full(context, NvAuth::NvIndex(object.into()), handle)
    });
    match read {
        Ok(bytes) if (1..=max).contains(&bytes.len()) => Ok(Some(bytes)),
        Ok(bytes) => {
            tracing::warn!(
                bytes = bytes.len(),
                "the {what} in the TPM has an impossible size: left out"
            );
            Ok(None)
        }
        Err(TpmError::Refused { source, .. }) => {
            tracing::warn!(error = %source, "the {what} in the TPM cannot be read: left out");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// What the indices of the chain hold, up to the first that is not there.
fn read_chain(device: &mut Device) -> Result<Vec<u8>, TpmError> {
    let mut chain = Vec::new();
    for index in CHAIN {
        let left = CERTIFICATE_MAX.saturating_sub(chain.len());
        match read(device, index, "endorsement certificate's chain", left)? {
            Some(part) => chain.extend_from_slice(&part),
            None => break,
        }
    }
    Ok(chain)
}

/// The certificate without its padding, and those of `chain` that issued it and one another. Others stay away: the chain serves the
/// TPM's other keys as well, and a verifier reads only a few. `None`: there is nothing to add.
fn with_issuers(certificate: &[u8], chain: &[u8]) -> Option<Vec<u8>> {
    let (_, leaf) = X509Certificate::from_der(certificate).ok()?;
    let mut known = Vec::new();
    let mut rest = chain;
    while let Ok((after, one)) = X509Certificate::from_der(rest) {
        known.push(one);
        rest = after;
    }
    let mut out = leaf.as_raw().to_vec();
    let mut below = &leaf;
    for _ in 0..CHAIN_MAX {
        let issued = |other: &&X509Certificate<'_>| other.subject().as_raw() == below.issuer().as_raw();
        // A root ends the way, whether the TPM has it or not: the verifier knows its own.
        let Some(issuer) = known
            .iter()
            .find(issued)
            .filter(|issuer| issuer.subject() != issuer.issuer())
        else {
            break;
        };
        out.extend_from_slice(issuer.as_raw());
        below = issuer;
    }
    (out.len() > leaf.as_raw().len()).then_some(out)
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    use super::*;

    /// A certificate for `name` by `issuer`; signatures do not count here.
    fn certificate(name: &str, issuer: &str) -> Vec<u8> {
        let params = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params
        };
        let (key, by) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let issuer = params(issuer);
        let certificate = params(name)
            .signed_by(&key, &Issuer::from_params(&issuer, &by))
            .unwrap();
        certificate.der().to_vec()
    }

    #[test]
    fn only_the_issuers_of_a_certificate_are_sent_with_it() {
        let leaf = certificate("ek", "low");
        let (low, middle, root) = (
            certificate("low", "middle"),
            certificate("middle", "root"),
            certificate("root", "root"),
        );
        let other = certificate("other", "middle");
        let chain = [&root[..], &other, &middle, &low, &[0xff; 40]].concat();
        let padded = [&leaf[..], &[0xff; 100]].concat();
        assert_eq!(
            with_issuers(&padded, &chain).unwrap(),
            [&leaf[..], &low, &middle].concat()
        );
        // What is added must be for the maker's part of the chain; a certificate alone stays as it was stored.
        assert_eq!(with_issuers(&padded, &[&other[..], &middle].concat()), None);
        assert_eq!(with_issuers(&padded, &[]), None);
        assert_eq!(with_issuers(&[1, 2, 3], &chain), None);
    }

    #[test]
    fn certificates_that_issue_one_another_end() {
        let (a, b) = (certificate("a", "b"), certificate("b", "a"));
        let sent = with_issuers(&certificate("ek", "a"), &[&a[..], &b].concat()).unwrap();
        let count = std::iter::successors(Some(sent.as_slice()), |rest| {
            X509Certificate::from_der(rest).ok().map(|(after, _)| after)
        });
        assert_eq!(count.count() - 1, 1 + CHAIN_MAX);
    }
}
