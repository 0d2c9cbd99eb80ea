// Package retry is how a node waits between attempts: exponential back-off
// with jitter, so that a cluster that was switched on at once doesn't ask its
// head in step. Time is passed in, so that tests need none.
package retry

import (
	"context"
	"math/rand/v2"
	"time"
)

// Clock is the time a package lives by.
type Clock interface {
	Now() time.Time
	After(d time.Duration) <-chan time.Time
}

// System is the machine's clock.
type System struct{}

// Now is time.Now.
func (System) Now() time.Time { return time.Now() }

// After is time.After.
func (System) After(d time.Duration) <-chan time.Time { return time.After(d) }

// Backoff yields growing waits. The zero value yields zero waits; it isn't
// safe for use by several goroutines.
type Backoff struct {
	Min, Max time.Duration // first and longest wait, before jitter
	Jitter   float64       // share of the wait that is random: 0.5 spreads 1 s over 0.75..1.25 s
	Rand     func() float64

	n int
}

// Next returns the wait before the next attempt.
func (b *Backoff) Next() time.Duration {
	d := b.Min
	for range b.n {
		if d >= b.Max/2 {
			d = b.Max
			break
		}
		d *= 2
	}
	d = min(d, b.Max)
	b.n++
	random := b.Rand
	if random == nil {
		random = rand.Float64
	}
	return time.Duration(float64(d) * (1 + b.Jitter*(random()-0.5)))
}

// Reset makes the next wait the first again.
func (b *Backoff) Reset() { b.n = 0 }

// Wait waits for d or until ctx ends, whose error it then returns.
func Wait(ctx context.Context, clock Clock, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-clock.After(d):
		return ctx.Err()
	}
}

// Do calls try until it succeeds or ctx ends. say hears of every failure and
// of the wait that follows.
func Do(ctx context.Context, clock Clock, b Backoff, try func(ctx context.Context, attempt int) error, say func(err error, wait time.Duration)) error {
	for attempt := 1; ; attempt++ {
		err := try(ctx, attempt)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		wait := b.Next()
		say(err, wait)
		if werr := Wait(ctx, clock, wait); werr != nil {
			return err
		}
	}
}
