// Package enroll gets a node its identity from the head: stage 1 does it while
// nobody else runs on the node, the node daemon when stage 1 could not.
//
// The key is made on the node, in memory, and never leaves it. The settings that
// the head gives to a machine that boots carry a token, which is good for one
// certificate for that key (see services/identity). An answer that gets lost on
// the way costs nothing but another attempt.
package enroll

import (
	"context"
	"errors"
	"fmt"
	"time"

	"krgimage/node/retry"
	"krgimage/node/settings"
	"krgimage/services/identity"
)

// Head is what is needed of the head; *settings.Head is one.
type Head interface {
	Fetch(ctx context.Context, boot string) (settings.Settings, error)
	Certify(ctx context.Context, token string, request []byte) (cert, authority []byte, err error)
}

// Errors that a caller decides on, besides those of package settings.
var (
	// ErrNoCluster says that the head has no cluster service.
	ErrNoCluster = errors.New("the head has no cluster service")
	// ErrWait says that the head gives no token now; asking again later may help.
	ErrWait = errors.New("the head doesn't admit this node now")
)

// Once fetches the settings and makes one attempt at the identity, which is kept
// in dir. Settings come also with an error if only the identity failed; the token
// is not in them any more.
func Once(ctx context.Context, head Head, dir, boot string) (settings.Settings, *identity.Holder, error) {
	s, err := head.Fetch(ctx, boot)
	if err != nil {
		return settings.Settings{}, nil, err
	}
	if s.Cluster == nil {
		return s, nil, ErrNoCluster
	}
	token := s.Cluster.Token
	c := *s.Cluster
	c.Token = ""
	s.Cluster = &c
	h, err := certify(ctx, head, dir, token, c.Wait)
	return s, h, err
}

func certify(ctx context.Context, head Head, dir, token, wait string) (*identity.Holder, error) {
	h, err := identity.LoadHolder(dir, nil)
	fresh := err != nil
	if fresh {
		// A key that can't be read is worth no more than none.
		if h, err = identity.NewHolder(dir, nil); err != nil {
			return nil, fmt.Errorf("make the node's key: %w", err)
		}
	} else if _, ok := h.ID(); ok {
		return h, nil
	}
	if token == "" && fresh {
		return nil, fmt.Errorf("%w: %s", ErrWait, wait)
	}
	// Without a token, with a key from before: the head may have admitted it and
	// its answer was lost.
	if err := h.Renew(ctx, func(ctx context.Context, request []byte) ([]byte, []byte, error) {
		return head.Certify(ctx, token, request)
	}); err != nil {
		if token == "" {
			return nil, fmt.Errorf("%w: %s (%w)", ErrWait, wait, err)
		}
		return nil, err
	}
	return h, nil
}

// Ensure returns the identity in dir; when there is none it asks the head until
// it gets one, or ctx ends. failed is told of each failure (may be nil).
func Ensure(ctx context.Context, head Head, dir string, failed func(err error, again time.Duration)) (*identity.Holder, error) {
	if h, err := identity.LoadHolder(dir, nil); err == nil {
		if _, ok := h.ID(); ok {
			return h, nil
		}
	}
	boot, err := settings.BootID()
	if err != nil {
		return nil, err
	}
	if failed == nil {
		failed = func(error, time.Duration) {}
	}
	var holder *identity.Holder
	wait := retry.Backoff{Min: time.Second, Max: 30 * time.Second, Jitter: 0.3}
	err = retry.Do(ctx, retry.System{}, wait, func(ctx context.Context, _ int) error {
		_, h, err := Once(ctx, head, dir, boot)
		holder = h
		return err
	}, failed)
	return holder, err
}

// Renewer renews over the node interface. It works without a connection to the
// cluster service, also with a certificate that has expired.
func Renewer(head Head) identity.Renewer {
	return func(ctx context.Context, request []byte) ([]byte, []byte, error) {
		return head.Certify(ctx, "", request)
	}
}
