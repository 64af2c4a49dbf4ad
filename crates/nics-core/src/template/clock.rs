//! The time of day as Python's `strftime` writes it.

use minijinja::{Error, ErrorKind};
use time::{Month, OffsetDateTime, Weekday};

/// `datetime.now().strftime(format)` in the C locale, at `now` or at the local time.
pub(super) fn strftime(format: &str, now: Option<OffsetDateTime>) -> Result<String, Error> {
    // The local offset cannot always be told safely in a process with threads; UTC is the usual way out.
    let now =
        now.unwrap_or_else(|| OffsetDateTime::now_local().unwrap_or_else(|_| OffsetDateTime::now_utc()));
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let plain = directive == Some('-');
        if plain {
            directive = chars.next();
        }
        let number =
            |value: i64, width: usize| if plain { value.to_string() } else { format!("{value:0width$}") };
        let hour12 = i64::from((now.hour() + 11) % 12 + 1);
        let text = match directive {
            Some('Y') => now.year().to_string(),
            Some('y') => number(i64::from(now.year().rem_euclid(100)), 2),
            Some('m') => number(i64::from(u8::from(now.month())), 2),
            Some('d') => number(i64::from(now.day()), 2),
            Some('e') => format!("{:2}", now.day()),
            Some('H') => number(i64::from(now.hour()), 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(i64::from(now.minute()), 2),
            Some('S') => number(i64::from(now.second()), 2),
            Some('f') => number(i64::from(now.microsecond()), 6),
            Some('j') => number(i64::from(now.ordinal()), 3),
            Some('B') => month(now.month()).to_owned(),
            Some('b' | 'h') => month(now.month())[..3].to_owned(),
            Some('A') => weekday(now.weekday()).to_owned(),
            Some('a') => weekday(now.weekday())[..3].to_owned(),
            Some('w') => now.weekday().number_days_from_sunday().to_string(),
            Some('u') => now.weekday().number_from_monday().to_string(),
            Some('p') => if now.hour() < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{}-{:02}-{:02}", now.year(), u8::from(now.month()), now.day()),
            Some('T') => format!("{:02}:{:02}:{:02}", now.hour(), now.minute(), now.second()),
            Some('R') => format!("{:02}:{:02}", now.hour(), now.minute()),
            Some('D') => format!("{:02}/{:02}/{:02}", u8::from(now.month()), now.day(), now.year() % 100),
            // Python's now() knows no time zone.
            Some('z' | 'Z') => String::new(),
            Some('n') => "\n".to_owned(),
            Some('t') => "\t".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let detail =
                    format!("strftime_now does not know %{}", other.map_or(String::new(), String::from));
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

fn month(month: Month) -> &'static str {
    [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ][usize::from(u8::from(month)) - 1]
}

fn weekday(day: Weekday) -> &'static str {
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
        [usize::from(day.number_days_from_monday())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_print_as_python_does() {
        // datetime(2024, 2, 9, 0, 5, 7, 42)
        let now = time::macros::datetime!(2024-02-09 00:05:07.000042 UTC);
        for (format, expected) in [
            ("%Y-%m-%d %H:%M:%S.%f", "2024-02-09 00:05:07.000042"),
            ("%A, %d %B %Y", "Friday, 09 February 2024"),
            ("%a %b %e %-d %-m", "Fri Feb  9 9 2"),
            ("%I:%M %p %j %y %%", "12:05 AM 040 24 %"),
            ("%F %T %D %R %w %u", "2024-02-09 00:05:07 02/09/24 00:05 5 5"),
            ("%Z日", "日"),
        ] {
            assert_eq!(strftime(format, Some(now)).unwrap(), expected);
        }
        assert!(strftime("%Q", Some(now)).is_err());
        assert!(strftime("%", Some(now)).is_err());
    }
}
