//! The release key: a P-256 key for one answer of the verifier, alive for seconds.
//!
//! It lives in the NULL hierarchy (gone with a reset), has a random unique field (never the same twice), and neither
//! userWithAuth nor adminWithPolicy: only its policy, PolicyPCR over the quoted PCRs, lets it be used, while TPM2_Certify works
//! with the empty password.

use assay_evidence::digest::Sha256Digest;
use assay_evidence::quote::QUOTED_PCRS;
use assay_evidence::tpm::policy_pcr_digest;
use assay_evidence::wire::Hex;
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::constants::SessionType;
use tss_esapi::constants::response_code::Tss2ResponseCodeKind;
use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::structures::{
    Digest, EccParameter, EccPoint, EccScheme, KeyDerivationFunctionScheme, Public, PublicBuilder,
    PublicEccParametersBuilder,
};
use zeroize::Zeroizing;

use super::device::{Device, PCR_ATTEMPTS};
use super::keys::{self, Session};
use super::{QuotedValues, TpmError};

/// What of a release key may be known.
pub(super) struct ReleasePublic {
    pub id: u64,
    pub public: Vec<u8>,
    pub name: Vec<u8>,
}

/// A release key in the TPM.
pub(super) struct ReleaseKey {
    handle: KeyHandle,
    pcrs: QuotedValues,
}

impl ReleaseKey {
    /// Makes a key bound to the PCRs as they are now. The second value is its TPMT_PUBLIC.
    pub(super) fn create(device: &mut Device) -> Result<(Self, Vec<u8>), TpmError> {
        const OPERATION: &str = "TPM2_CreatePrimary";
        let pcrs = device.read_quoted_pcrs()?;
        let random = device.run("TPM2_GetRandom", |context| context.get_random(32))?;
        let template = template(policy_digest(&pcrs), random.value()).map_err(|source| TpmError::Refused {
            operation: "release key template",
            source,
        })?;
        let made = device.run_authorised(OPERATION, |context| {
            context.create_primary(Hierarchy::Null, template.clone(), None, None, None, None)
        })?;
        let key = Self {
            handle: made.key_handle,
            pcrs,
        };
        match keys::marshal_public(&made.out_public) {
            Ok(public) => Ok((key, public)),
            Err(error) => {
                key.flush(device);
                Err(error)
            }
        }
    }

    pub(super) fn handle(&self) -> KeyHandle {
        self.handle
    }

    /// The PCRs that the key can be used in.
    pub(super) fn pcrs(&self) -> &QuotedValues {
        &self.pcrs
    }

    /// TPM2_ECDH_ZGen under the key's policy.
    pub(super) fn ecdh(&self, device: &mut Device, x: [u8; 32], y: [u8; 32]) -> Result<Zeroizing<[u8; 32]>, TpmError> {
        const OPERATION: &str = "TPM2_ECDH_ZGen";
        let refused = |source| TpmError::Refused {
            operation: OPERATION,
            source,
        };
        let point = EccPoint::new(
            EccParameter::try_from(x.to_vec()).map_err(refused)?,
            EccParameter::try_from(y.to_vec()).map_err(refused)?,
        );
        for _ in 0..PCR_ATTEMPTS {
            // Salted to the key itself: its public area is the one that the attestation key certified and the verifier
            // encrypted to, so whoever sits on the bus cannot have put another in its place.
            let session = Session::start(device, SessionType::Policy, Some(self.handle))?;
            let result = self.ecdh_in(device, &session, &point);
            session.end(device);
            match result {
                // Some PCR was extended since PolicyPCR, even one that the policy does not name: the session is spent.
                Err(TpmError::Refused { source, .. }) if is(source, Tss2ResponseCodeKind::PcrChanged) => {}
                Err(TpmError::Refused { source, .. }) if is(source, Tss2ResponseCodeKind::PolicyFail) => break,
                Err(error) => return Err(error),
                Ok(z) => return left_padded(z.x().value()),
            }
        }
        Err(TpmError::PcrsMoving {
            operation: OPERATION,
            attempts: PCR_ATTEMPTS,
        })
    }

    /// Removes the key from the TPM.
    pub(super) fn flush(self, device: &mut Device) {
        device.flush(self.handle.into());
    }

    fn ecdh_in(&self, device: &mut Device, session: &Session, point: &EccPoint) -> Result<EccPoint, TpmError> {
        let policy = session.policy()?;
        let selection = device.quoted_selection();
        device.run("TPM2_PolicyPCR", |context| {
            context.policy_pcr(policy, Digest::default(), selection.clone())
        })?;
        let sessions = (Some(session.0), None, None);
        device.run("TPM2_ECDH_ZGen", |context| {
            context.execute_with_sessions(sessions, |context| context.ecdh_z_gen(self.handle, point.clone()))
        })
    }
}

/// TPMs may leave out leading zeros of a coordinate.
fn left_padded(x: &[u8]) -> Result<Zeroizing<[u8; 32]>, TpmError> {
    let mut padded = Zeroizing::new([0; 32]);
    let start = padded.len().checked_sub(x.len());
    match start.and_then(|start| padded.get_mut(start..)) {
        Some(end) => end.copy_from_slice(x),
        None => {
            return Err(TpmError::Nonsense {
                operation: "TPM2_ECDH_ZGen",
                what: "the point is too large",
            });
        }
    }
    Ok(padded)
}

fn is(error: tss_esapi::Error, kind: Tss2ResponseCodeKind) -> bool {
    matches!(error, tss_esapi::Error::Tss2Error(code) if code.kind() == Some(kind))
}

/// The key's authPolicy, by the same rule that the verifier checks it with.
fn policy_digest(pcrs: &QuotedValues) -> [u8; 32] {
    let values = QUOTED_PCRS
        .into_iter()
        .zip(pcrs.iter().map(|value| Hex(value.to_vec())));
    *policy_pcr_digest(&values.collect()).as_bytes()
}

fn template(policy: [u8; 32], unique: &[u8]) -> tss_esapi::Result<Public> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_no_da(true)
        .with_decrypt(true)
        .build()?;
    let parameters = PublicEccParametersBuilder::new()
        .with_ecc_scheme(EccScheme::Null)
        .with_curve(EccCurve::NistP256)
        .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
        .with_is_decryption_key(true)
        .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_auth_policy(Digest::try_from(policy.to_vec())?)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::new(
            EccParameter::try_from(unique.to_vec())?,
            EccParameter::try_from(Sha256Digest::of(unique).as_bytes().to_vec())?,
        ))
        .build()
}
