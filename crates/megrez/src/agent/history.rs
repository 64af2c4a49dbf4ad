//! How much of a conversation the model is shown.

use nics_core::template::Message;

/// The newest turns of `messages`: a turn begins at a user's message. At most `window` turns; the newest always, older
/// ones while the conversation, as `count` measures it in tokens, stays below `max_tokens`.
///
/// # Errors
/// What `count` returns.
pub fn truncate<E>(
    messages: &[Message],
    window: usize,
    max_tokens: usize,
    count: &mut dyn FnMut(&[Message]) -> Result<usize, E>,
) -> Result<Vec<Message>, E> {
    // What comes before the first user's message belongs to the first turn.
    let mut starts: Vec<usize> =
        messages.iter().enumerate().filter(|(_, m)| m.role == "user").map(|(i, _)| i).collect();
    match starts.first_mut() {
        Some(first) => *first = 0,
        None => return Ok(messages.to_vec()),
    }
    let mut from = starts[starts.len() - 1];
    for &start in starts.iter().rev().skip(1).take(window.saturating_sub(1)) {
        if count(&messages[start..])? >= max_tokens {
            break;
        }
        from = start;
    }
    Ok(messages[from..].to_vec())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn the_newest_turn_stays_whatever_its_length() {
        let said = |role: &str, text: &str| Message::new(role, text);
        let all = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")];
        let keep =
            |window, max| truncate::<Infallible>(&all, window, max, &mut |m| Ok(m.len())).unwrap().len();
        assert_eq!(keep(2, 100), 4);
        assert_eq!(keep(2, 4), 2, "the limit itself is too many");
        assert_eq!(keep(1, 100), 2);
        assert_eq!(keep(0, 0), 2);
        assert!(truncate::<Infallible>(&[], 2, 9, &mut |m| Ok(m.len())).unwrap().is_empty());
    }
}
