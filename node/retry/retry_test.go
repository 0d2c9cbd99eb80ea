package retry

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"
)

func TestBackoff(t *testing.T) {
	b := Backoff{Min: time.Second, Max: 5 * time.Second, Jitter: 0.5, Rand: func() float64 { return 0.5 }}
	var got []time.Duration
	for range 5 {
		got = append(got, b.Next())
	}
	want := []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 5 * time.Second, 5 * time.Second}
	if !slices.Equal(got, want) {
		t.Errorf("waits = %v, want %v", got, want)
	}
	b.Reset()
	b.Rand = func() float64 { return 0 }
	if d := b.Next(); d != 750*time.Millisecond {
		t.Errorf("least wait = %v, want 750ms", d)
	}
	for range 200 { // must not overflow
		b.Next()
	}
	if d := b.Next(); d > 5*time.Second {
		t.Errorf("wait = %v, above Max", d)
	}
}

type instant struct{ waits []time.Duration }

func (c *instant) Now() time.Time { return time.Time{} }
func (c *instant) After(d time.Duration) <-chan time.Time {
	c.waits = append(c.waits, d)
	ch := make(chan time.Time, 1)
	ch <- time.Time{}
	return ch
}

func TestDo(t *testing.T) {
	var clock instant
	var said int
	err := Do(context.Background(), &clock, Backoff{Min: 1, Max: 8}, func(_ context.Context, attempt int) error {
		if attempt < 4 {
			return errors.New("not yet")
		}
		return nil
	}, func(error, time.Duration) { said++ })
	if err != nil || said != 3 || len(clock.waits) != 3 {
		t.Errorf("err %v, said %d, waits %v", err, said, clock.waits)
	}

	ctx, cancel := context.WithCancel(context.Background())
	bad := errors.New("bad")
	err = Do(ctx, &clock, Backoff{}, func(context.Context, int) error { cancel(); return bad }, func(error, time.Duration) { t.Error("said after the end") })
	if !errors.Is(err, bad) {
		t.Errorf("Do after cancel = %v", err)
	}
}
