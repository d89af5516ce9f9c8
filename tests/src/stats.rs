//! For benchmarks.

/// The value that this share of the values does not exceed; NaN of none.
#[must_use]
pub fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index into some thousand values"
    )]
    let index = ((values.len() as f64 * share).ceil() as usize).saturating_sub(1);
    values.get(index).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_values_is_not_above_its_quantile() {
        let values = vec![5.0, 1.0, 4.0, 2.0, 3.0];
        let found = [0.0, 0.2, 0.21, 0.5, 0.99, 1.0].map(|share| quantile(values.clone(), share));
        assert_eq!(found, [1.0, 1.0, 2.0, 3.0, 5.0, 5.0]);
        assert!(quantile(Vec::new(), 0.5).is_nan());
    }
}
