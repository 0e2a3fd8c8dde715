//! Dates for templates: the part of `strftime` that they use.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
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
];
const WEEKDAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

/// A second of the Gregorian calendar, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    year: u64,
    /// 0 to 11.
    month: usize,
    /// 1 to 31.
    day: u64,
    /// 1 to 366.
    day_of_year: u64,
    /// 0 is Monday.
    weekday: usize,
    second_of_day: u64,
}

impl From<SystemTime> for Moment {
    /// Times before 1970 count as its beginning.
    fn from(time: SystemTime) -> Self {
        let seconds = time
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs())
            // The year 9999 is the last that has four digits.
            .min(253_402_300_799);
        let (mut day, second_of_day) = (seconds / 86_400, seconds % 86_400);
        // The first day of 1970 was a Thursday.
        let weekday = ((day + 3) % 7) as usize;
        let mut year = 1970;
        while day >= days_of_year(year) {
            day -= days_of_year(year);
            year += 1;
        }
        let day_of_year = day + 1;
        let mut month = 0;
        while day >= days_of_month(year, month) {
            day -= days_of_month(year, month);
            month += 1;
        }
        Moment {
            year,
            month,
            day: day + 1,
            day_of_year,
            weekday,
            second_of_day,
        }
    }
}

impl Moment {
    /// The moment as `format` asks for it; codes that are not known stand as they are.
    pub(crate) fn format(self, format: &str) -> String {
        let (hour, minute, second) = (
            self.second_of_day / 3600,
            self.second_of_day / 60 % 60,
            self.second_of_day % 60,
        );
        let twelve = (hour + 11) % 12 + 1;
        let mut out = String::with_capacity(format.len());
        let mut codes = format.chars();
        while let Some(c) = codes.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut code = codes.next();
            let padded = code != Some('-');
            if !padded {
                code = codes.next();
            }
            let number = |out: &mut String, value: u64, width: usize| {
                let width = if padded { width } else { 0 };
                // Writing to a string cannot fail.
                let _ = write!(out, "{value:0width$}");
            };
            match code {
                Some('Y') => number(&mut out, self.year, 4),
                Some('y') => number(&mut out, self.year % 100, 2),
                Some('m') => number(&mut out, self.month as u64 + 1, 2),
                Some('d') => number(&mut out, self.day, 2),
                Some('j') => number(&mut out, self.day_of_year, 3),
                Some('H') => number(&mut out, hour, 2),
                Some('I') => number(&mut out, twelve, 2),
                Some('M') => number(&mut out, minute, 2),
                Some('S') => number(&mut out, second, 2),
                Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
                Some('B') => out.push_str(MONTHS[self.month]),
                Some('b') => out.push_str(&MONTHS[self.month][..3]),
                Some('A') => out.push_str(WEEKDAYS[self.weekday]),
                Some('a') => out.push_str(&WEEKDAYS[self.weekday][..3]),
                Some('F') => out.push_str(&self.format("%Y-%m-%d")),
                Some('T') => out.push_str(&self.format("%H:%M:%S")),
                Some('%') => out.push('%'),
                other => {
                    out.push_str(if padded { "%" } else { "%-" });
                    out.extend(other);
                }
            }
        }
        out
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_of_month(year: u64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment::from(UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn known_moments_are_written_as_the_calendar_has_them() {
        let all = "%A %d %B %Y %H:%M:%S day %j %y %I %p %a %b";
        assert_eq!(
            at(0).format(all),
            "Thursday 01 January 1970 00:00:00 day 001 70 12 AM Thu Jan"
        );
        // The leap day of a year divisible by 400, one second before it ends.
        assert_eq!(
            at(951_868_799).format(all),
            "Tuesday 29 February 2000 23:59:59 day 060 00 11 PM Tue Feb"
        );
        assert_eq!(
            at(1_735_689_600).format("%-d.%-m.%F %T%%%q"),
            "1.1.2025-01-01 00:00:00%%q"
        );
        assert_eq!(at(u64::MAX >> 2).format("%F"), "9999-12-31");
    }
}
