package identity

import (
	"time"

	"golang.org/x/sys/unix"
)

// sinceBoot is the time since the machine started, sleep included. Nobody can
// set this clock.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock is in every Linux since 2.6.39
	}
	return time.Duration(ts.Nano())
}
