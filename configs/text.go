package configs

import (
	"errors"
	"fmt"
	"math"
	"net"
	"strconv"
	"strings"
	"time"
)

// Duration is a time.Duration written as "12h" or "90s".
type Duration time.Duration

// Size is a number of bytes written as "512MiB" or "1GiB".
type Size int64

// MAC is an Ethernet address, lower case with colons when printed.
type MAC string

var errRange = errors.New("out of range")

// sizeUnits goes from the largest down, so that printing takes the first that
// divides the value.
var sizeUnits = []struct {
	name  string
	bytes int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

// String prints d without zero parts: "12h", not "12h0m0s".
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText accepts what time.ParseDuration does.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return errors.New("not a duration")
	}
	*d = Duration(v)
	return nil
}

// String prints s in the largest binary unit that divides it: "512MiB".
func (s Size) String() string {
	for _, u := range sizeUnits {
		if s != 0 && int64(s)%u.bytes == 0 {
			return strconv.FormatInt(int64(s)/u.bytes, 10) + u.name
		}
	}
	return "0B"
}

// MarshalText implements encoding.TextMarshaler.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText accepts a whole number with one of the units B, KiB, MiB, GiB
// and TiB. Decimal units are refused rather than guessed at: memory is sold and
// given to QEMU in binary ones.
func (s *Size) UnmarshalText(text []byte) error {
	t := string(text)
	for _, u := range sizeUnits {
		digits, ok := strings.CutSuffix(t, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimRight(digits, " "), 10, 64)
		if err != nil {
			break
		}
		if n < 0 || n > math.MaxInt64/u.bytes {
			return errRange
		}
		*s = Size(n * u.bytes)
		return nil
	}
	return errors.New("not a size with a unit")
}

// HardwareAddr returns the address's six bytes; a MAC that passed validation
// always has them.
func (m MAC) HardwareAddr() net.HardwareAddr {
	hw, err := net.ParseMAC(string(m))
	if err != nil {
		return nil
	}
	return hw
}

// MarshalText implements encoding.TextMarshaler.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m), nil }

// UnmarshalText accepts 52:54:00:12:34:56, 52-54-00-12-34-56 and
// 5254.0012.3456 in either case and keeps the first form in lower case.
func (m *MAC) UnmarshalText(text []byte) error {
	hw, err := net.ParseMAC(string(text))
	if err != nil {
		return errors.New("not an Ethernet address")
	}
	if len(hw) != 6 {
		return fmt.Errorf("an Ethernet address has 6 bytes, this has %d", len(hw))
	}
	*m = MAC(hw.String())
	return nil
}
